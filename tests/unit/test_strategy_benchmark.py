"""The comparison of strategies: real federations of a tiny model, what is kept of them, and how it is shown."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.common import machine
from benchmarks.strategies.__main__ import measure
from benchmarks.strategies.kept import Kept
from benchmarks.strategies.plot import drawing
from benchmarks.strategies.summary import compare, page, summarise
from benchmarks.strategies.task import TASKS, Task, choices, refusal
from strategies.registry import RECIPES
from tests.site_handlers import TINY, make_home

NAMES = ("fedavg", "ffa-lora", "fedsa-lora", "fedex")
SHOWN = {
    "num_sites": 3,
    "num_rounds": 2,
    "local_steps": 2,
    "personal_steps": 1,
    "seeds": [5],
    "machine": machine(),
}


def tiny_task(folder: Path) -> Task:
    make_home(folder, 48)
    settings = {
        **TINY,
        "model.source": f"path:{folder / 'tiny'}",
        "data.source": f"file:{folder / 'dialogues.jsonl'}",
        "train.learning_rate": 0.02,
        "transport.uplink": "delta|fp32",
        "transport.downlink": "delta|fp32",
        "evaluation.local_only": False,
        "evaluation.prompt": "",
    }
    return Task(num_sites=3, num_rounds=2, local_steps=2, personal_steps=1, settings=settings)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Task]:
    folder = tmp_path_factory.mktemp("task")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLLM_CACHE", str(folder / "cache"))
        yield tiny_task(folder)


@pytest.fixture(scope="module")
def outcome(task: Task, kept: Path) -> dict[str, Any]:
    """Four federations and both bounds, each with a server in a process of its own."""
    return measure(task, {name: choices()[name] for name in NAMES}, [5], Kept(kept))


def test_a_run_measures_what_its_strategy_is_about(outcome: dict[str, Any]) -> None:
    assert outcome["refused"] == outcome["failed"] == {}
    rows = outcome["strategies"]
    assert rows.keys() == set(NAMES)
    assert rows["ffa-lora"]["exactness_error"] < 1e-6 < rows["fedavg"]["exactness_error"] < 1
    assert rows["fedex"]["exactness_error"] < 1e-6, "its side factors are part of what sites apply"
    assert rows["fedsa-lora"]["exactness_error"] is None
    assert 0.3 < rows["ffa-lora"]["bytes_up"] / rows["fedavg"]["bytes_up"] < 0.7
    for row in rows.values():
        assert 0 < row["server_s"] < 60
        assert 50e6 < row["server_peak_rss_bytes"] < 600e6, "the server holds no base"
        assert row["heldout_loss_worst_site"] >= row["heldout_loss"] > 0
    assert rows["fedavg"]["heldout_loss_global"] == pytest.approx(rows["fedavg"]["heldout_loss"], rel=1e-6)
    assert rows["fedsa-lora"]["heldout_loss_global"] == pytest.approx(outcome["base_loss"], rel=1e-6)


def test_the_bounds_learn_and_pooled_text_is_no_worse_than_each_by_itself(outcome: dict[str, Any]) -> None:
    alone, together = outcome["local_only"], outcome["centralised"]
    assert max(alone["heldout_loss"], together["heldout_loss"]) < outcome["base_loss"] - 0.05
    assert together["heldout_loss"] < alone["heldout_loss"] + 0.05
    assert alone["seeds"][5]["sites"].keys() == {"site-0", "site-1", "site-2"}


def test_what_is_kept_is_not_run_again(outcome: dict[str, Any], task: Task, kept: Path) -> None:
    [path] = kept.glob("fedavg-seed5-*.json")
    content = json.loads(path.read_text())
    content["row"]["heldout_loss"] = 123.0
    path.write_text(json.dumps(content))
    again = measure(task, {name: choices()[name] for name in NAMES}, [5], Kept(kept))
    assert again["strategies"]["fedavg"]["heldout_loss"] == 123.0
    assert again["strategies"]["ffa-lora"] == outcome["strategies"]["ffa-lora"] | {
        key: again["strategies"]["ffa-lora"][key] for key in ("loss_over_fedavg", "loss_over_fedavg_range")
    }


def test_other_settings_are_another_run(tmp_path: Path) -> None:
    kept, calls = Kept(tmp_path / "folder"), []

    def run() -> dict[str, Any]:
        calls.append(1)
        return {"heldout_loss": float(len(calls))}

    assert kept.obtain("a", 1, {"x": 1}, run) == kept.obtain("a", 1, {"x": 1}, run) == {"heldout_loss": 1.0}
    others = [kept.obtain(*key, run) for key in [("a", 1, {"x": 2}), ("a", 2, {"x": 1}), ("b", 1, {"x": 1})]]
    assert [row["heldout_loss"] for row in others] == [2.0, 3.0, 4.0]
    assert Kept(None).obtain("a", 1, {"x": 1}, run) != Kept(None).obtain("a", 1, {"x": 1}, run)


def test_a_run_that_breaks_is_named_and_the_others_go_on(task: Task, kept: Path) -> None:
    chosen = {
        "fedavg": choices()["fedavg"],
        "broken": {"model.source": "path:/nowhere", "rounds.join_timeout_s": 0.5},
        "odd": {"strategy.name": "fedprompt"},
    }
    found = measure(task, chosen, [5], Kept(kept))
    assert found["strategies"].keys() == {"fedavg"}
    assert found["failed"].keys() == {"broken"}
    assert "soft prompts" in found["refused"]["odd"]


def test_every_registered_recipe_is_compared_and_goes_with_the_demo_or_says_why() -> None:
    assert set(RECIPES) <= set(choices())
    assert all(refusal(TASKS["demo"], choice) == "" for name, choice in choices().items() if name in NAMES)


def test_losses_are_compared_seed_by_seed() -> None:
    rows = {"fedavg": {1: 2.0, 2: 4.0}, "better": {1: 1.5, 2: 3.9}, "other": {3: 1.0}}
    results = {
        name: summarise({seed: {"heldout_loss": loss} for seed, loss in row.items()}) for name, row in rows.items()
    }
    compare(results)
    assert results["better"]["heldout_loss"] == pytest.approx(2.7)
    assert results["better"]["loss_over_fedavg"] == pytest.approx(-0.3)
    assert results["better"]["loss_over_fedavg_range"] == pytest.approx([-0.5, -0.1])
    assert results["other"]["loss_over_fedavg"] is None


def test_a_number_that_a_seed_lacks_has_no_mean() -> None:
    found = summarise({1: {"exactness_error": None, "a": 1.0}, 2: {"exactness_error": 0.1, "a": 2.0}})
    assert (found["exactness_error"], found["a"]) == (None, 1.5)


def test_the_page_has_a_row_for_each_and_the_drawing_a_mark(outcome: dict[str, Any]) -> None:
    text = page({**outcome, **SHOWN}, "python -m benchmarks.strategies")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(NAMES) + 2
    assert len({line.count("|") for line in table}) == 1
    losses = [float(re.split(r"\s*\|\s*", line)[2]) for line in table[2 : 2 + len(NAMES)]]
    assert losses == sorted(losses)
    assert all(math.isfinite(loss) for loss in losses)
    root = ElementTree.fromstring(drawing({**outcome, **SHOWN}))
    titles = {title.text.split(":")[0] for title in root.iter("{http://www.w3.org/2000/svg}title") if title.text}
    assert {*NAMES, "base", "local only", "centralised"} <= titles
