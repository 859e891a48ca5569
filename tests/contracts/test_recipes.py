"""What every registered recipe promises, with real sites on a tiny model and the default codecs.

- Both transports carry the same bits, and so does a run that was stopped and resumed in between.
- The end of a run says of every site what the base, training alone, the federation and its own adapter come to.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedllm.config import RunConfig
from fedllm.runs import RunFolder
from server_app.checkpoint import load_latest
from server_app.events import read_events
from server_app.results import Results
from strategies.registry import RECIPES
from tests.tiny_federation import run_tiny

NEEDS: dict[str, dict[str, Any]] = {
    "feddpa": {"adapter.personal_rank": 2},
    "fedpeptao": {
        "adapter.kind": "prefix",
        "adapter.rank": RunConfig().adapter.rank,
        "adapter.num_virtual_tokens": 4,
        "strategy.server_optimizer": "adam",
        "strategy.server_learning_rate": 0.01,
    },
    "fedprompt": {"adapter.kind": "prompt", "adapter.num_virtual_tokens": 4, "adapter.rank": RunConfig().adapter.rank},
    "hetlora": {"adapter.min_rank": 1, "simulation.ranks": "4,3", "strategy.tail_penalty": 20.0},
    "zero-padding": {"adapter.min_rank": 1, "simulation.ranks": "4,3"},
}
"""What a recipe needs beside its name, or what brings out what it can do."""

VARIANTS: dict[str, dict[str, Any]] = {
    "fedavg-buffered": {"strategy.name": "fedavg", "rounds.buffer_size": 2},
    "fedavg-adaptive-server": {"strategy.name": "fedavg", "strategy.server_optimizer": "yogi"},
    "fedavg-robust": {"strategy.name": "fedavg", "strategy.aggregator": "geometric-median"},
}
"""Choices on other axes, as far as two sites allow."""

CASES = {**{name: {"strategy.name": name, **NEEDS.get(name, {})} for name in sorted(RECIPES)}, **VARIANTS}
GUIDE = Path(__file__).parents[2] / "docs" / "strategies.md"
DEFAULTS = RunConfig()
SETTINGS: dict[str, Any] = {
    "transport.uplink": DEFAULTS.transport.uplink,
    "transport.downlink": DEFAULTS.transport.downlink,
    "train.schedule": "constant",
    "train.learning_rate": 0.02,
    "evaluation.every": 3,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLLM_CACHE", str(folder / "cache"))
        yield folder


def state_bits(folder: RunFolder) -> dict[str, bytes]:
    """Return everything that the next round would start from."""
    state = load_latest(folder.checkpoints)
    assert state is not None
    arrays = {f"{branch.group}/{name}": value for branch in state.branches for name, value in branch.params.items()}
    moments = {
        f"{kind}/{name}": value for kind, rows in state.optimizer.moments.items() for name, value in rows.items()
    }
    return {name: np.asarray(value).tobytes() for name, value in {**arrays, **moments}.items()}


@pytest.mark.parametrize("case", CASES)
def test_transports_and_restarts_leave_every_bit_and_the_end_tells_all_four_losses(case: str, home: Path) -> None:
    settings = {**SETTINGS, **CASES[case]}
    told = {"evaluation.local_only": True, "evaluation.personal_steps": 2}
    whole = run_tiny(home, name=f"{case}-whole", num_rounds=3, **settings, **told, **{"transport.kind": "grpc"})
    assert_moved(whole)
    assert_told(whole)
    name, parted = f"{case}-parted", {**settings, "transport.kind": "flower"}
    run_tiny(home, name=name, num_rounds=2, **parted)
    assert state_bits(run_tiny(home, name="", resume=name, num_rounds=3, **parted)) == state_bits(whole)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_the_guide_says_what_a_recipe_does_what_it_costs_and_where_it_comes_from(name: str) -> None:
    """One row of what it does, with its paper, and one of what it costs, which follows after."""
    does, costs = GUIDE.read_text().split("What each costs", maxsplit=1)
    row = re.compile(rf"\| (?:`[a-z-]+`, )*`{name}`[ ,].*")
    assert row.search(costs)
    described = row.findall(does) or row.findall(GUIDE.read_text().split("## Soft prompts")[1])
    assert any(re.search(r"arXiv \d{4}\.\d{5}", one) for one in described)


def assert_moved(folder: RunFolder) -> None:
    results = Results.of(read_events(folder.metrics))
    assert results.end is not None
    assert results.end.status == "finished"
    assert len(results.rounds) == 3
    assert all(not attempt.rejected for attempt in results.attempts)
    assert all((one.update_norm or 0) > 0 for one in results.rounds.values())


def assert_told(folder: RunFolder) -> None:
    rows = Results.of(read_events(folder.metrics)).rows()
    assert [row.name for row in rows] == ["site-0", "site-1", "all sites"]
    for row in rows:
        assert None not in (row.base, row.local_only, row.federated, row.personalised)
    for text in (folder.report.read_text(), folder.log.read_text()):
        assert all(column in text for column in ("base", "local only", "federated", "personalised"))
