"""What is wrong is said before anything is trained: expected, found, where, what to do. Real processes."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.flower_process import Flower, flower
from tests.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flower]:
    folder = tmp_path_factory.mktemp("federation")
    make_tiny_model(folder / "model")
    row = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}], "topic": "a"}
    (folder / "one.jsonl").write_text(json.dumps(row))
    (folder / "odd.jsonl").write_text('{"column": 1}')
    with flower(folder, FEDLLM_CACHE=str(folder / "cache")) as started:
        yield started


CASES = {
    "missing file": ({"data.source": "file:absent.jsonl"}, ["DataError", "absent.jsonl"]),
    "unknown shape": ({"data.source": "file:odd.jsonl"}, ["DataError", "odd.jsonl", "column"]),
    "more sites than examples": ({"data.source": "file:one.jsonl", "simulation.partitioner": "iid"}, ["DataError"]),
    "missing base": ({"data.source": "file:one.jsonl", "model.source": "path:absent"}, ["ModelError", "absent"]),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_input_ends_the_run_before_training_with_every_sites_reason(home: Flower, case: str) -> None:
    changes, words = CASES[case]
    name = case.replace(" ", "-")
    output = home.run({"name": name, "model.source": "path:model", **changes}, num_sites=2)
    [end] = [event for event in home.events(name) if event["event"] == "end"]
    assert end["status"] == "failed", output
    assert "too few sites joined" in str(end["reason"])
    for word in words:
        assert word in str(end["reason"]), end["reason"]
    assert not [event for event in home.events(name) if event["event"] in ("round", "attempt", "evaluation")]


def test_an_unknown_key_is_refused_before_a_run_is_started(home: Flower) -> None:
    output = home.run({"name": "unknown-key", "train.learning_rat": 0.1}, num_sites=2)
    assert "Successfully started run" not in output, output
    assert not (home.folder / "runs" / "unknown-key").exists()


def test_a_value_that_cannot_be_is_refused_before_a_folder_is_made(home: Flower) -> None:
    output = home.run({"name": "bad-value", "num_rounds": 0}, num_sites=2)
    assert "num_rounds" in output
    assert "greater than or equal to 1" in output
    assert not (home.folder / "runs" / "bad-value").exists()
