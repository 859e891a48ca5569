"""Federations with attackers, through the real round loop and both transports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedllm.config import Scalar, read_run_config
from fedllm.errors import QuorumError
from fedllm.messages import AnyMessage, TrainInstruction
from fedllm.model.initial import initial_arrays
from fedllm.runs import RunFolder
from fedllm.update import Arrays
from fedllm.wire.transport import Envelope
from server_app.app import open_run, run_federation
from server_app.checkpoint import load_latest
from tests.fake_federation import LAYOUT, Handler, InProcessGrid, QuadraticSite
from tests.robust_tools import RULES

SETTINGS: dict[str, Scalar] = {
    "name": "test",
    "num_rounds": 6,
    "rounds.min_sites": 7,
    "rounds.deadline_s": 120.0,
    "strategy.byzantine_sites": 2,
    "strategy.max_weight_share": 0.2,
    "strategy.trim_fraction": 0.3,
    "transport.uplink": "delta|int8:64|zstd:3",
    "transport.downlink": "delta|int8:64|zstd:3",
    "evaluation.local_only": False,
}
NUM_SITES, NUM_ATTACKERS = 7, 2


class NearSite(QuadraticSite):
    """A site whose optimum lies near the others': theirs all, plus a little of its own."""

    def __init__(self, name: str, seed: int, **others: Any) -> None:
        super().__init__(name, seed, **others)
        common = QuadraticSite("common", 1000).optimum
        self.optimum = {key: common[key] + np.float32(0.2) * value for key, value in self.optimum.items()}


class Liar(NearSite):
    """A site that hands in a multiple of its delta."""

    factor = -10.0

    def train(self, instruction: TrainInstruction, envelope: Envelope) -> tuple[AnyMessage, Envelope | None]:
        state = self.fetch(instruction, envelope)
        moved = self.moved(state)
        delta = {name: np.float32(self.factor) * (moved[name] - state[name]) for name in state}
        return self.report(instruction, state), self.push(instruction, envelope, delta)


class Broken(NearSite):
    """A site whose update has a value that is not a number, written past every check of its own."""

    def push(self, instruction: TrainInstruction, envelope: Envelope, delta: Arrays, **changes: Any) -> Envelope:
        import fedllm.codecs.payload as payload_module

        delta = {name: np.full_like(value, np.nan) for name, value in delta.items()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(payload_module, "check_arrays", lambda *_: None)
            settings = instruction.config | {"transport.uplink": "fp32"}
            return super().push(instruction.model_copy(update={"config": settings}), envelope, delta, **changes)


def members(liar: Callable[..., QuadraticSite] = Liar) -> dict[int, Handler]:
    kinds = [NearSite] * (NUM_SITES - NUM_ATTACKERS) + [liar] * NUM_ATTACKERS
    return {100 + index: kind(f"site-{index:02}", index) for index, kind in enumerate(kinds)}


def run(home: Path, grid: InProcessGrid, **changes: Scalar) -> RunFolder:
    folder, config, state = open_run(read_run_config({**SETTINGS, "home": str(home), **changes}))
    run_federation(grid, folder, config, state, run_id=1, fixed_sites=True)
    return folder


def rounds(folder: RunFolder) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    return [row for row in rows if row["event"] == "round"]


def distance_to_common(folder: RunFolder) -> float:
    """Return how far the global adapter ended from the honest optimum, over how far it started."""
    state = load_latest(folder.checkpoints)
    assert state is not None
    goal, start = QuadraticSite("common", 1000).optimum, initial_arrays(LAYOUT, 42)

    def norm(arrays: Arrays) -> float:
        return float(np.sqrt(sum(np.sum((arrays[name] - goal[name]) ** 2) for name in goal)))

    return norm(state.params) / norm(start)


@pytest.mark.parametrize("transport", ["grpc", "flower"])
def test_the_mean_is_driven_away_and_a_robust_rule_is_not(transport: str, tmp_path: Path) -> None:
    few = {"transport.kind": transport, "num_rounds": 4}
    mean = run(tmp_path / "mean", InProcessGrid(members()), **few)
    krum = run(tmp_path / "krum", InProcessGrid(members()), **few, **RULES["multi-krum"])
    assert distance_to_common(mean) > 2
    assert distance_to_common(krum) < 0.35
    for row in rounds(krum):
        measured = row["measurements"]
        assert measured["share/site-05"] == measured["share/site-06"] == 0.0
        assert measured["sites_used"] == 3
        assert row["participants"] == [f"site-{index:02}" for index in range(NUM_SITES)]


@pytest.mark.parametrize(("rule", "robust_on"), [*((rule, "factors") for rule in RULES), ("krum", "products")])
def test_every_rule_comes_near_the_honest_optimum(rule: str, robust_on: str, tmp_path: Path) -> None:
    settings = {**RULES[rule], "strategy.robust_on": robust_on, "transport.kind": "flower"}
    folder = run(tmp_path, InProcessGrid(members()), **settings)
    assert distance_to_common(folder) < 0.4
    assert all(row["update_norm"] > 0 for row in rounds(folder))


def test_updates_that_are_not_numbers_are_refused_before_any_rule_sees_them(tmp_path: Path) -> None:
    folder = run(
        tmp_path,
        InProcessGrid(members(Broken)),
        **RULES["median"],
        **{"rounds.min_sites": 5, "transport.kind": "flower"},
    )
    for row in rounds(folder):
        assert row["participants"] == [f"site-{index:02}" for index in range(NUM_SITES - NUM_ATTACKERS)]
        assert {part["site"] for part in row["rejected"]} == {"site-05", "site-06"}
        assert all("NonFiniteError" in part["reason"] for part in row["rejected"])
    assert distance_to_common(folder) < 0.1


def test_a_round_without_the_trusted_site_is_tried_again_and_then_ends_the_run(tmp_path: Path) -> None:
    settings = {**RULES["fltrust"], "strategy.trusted_site": "site-99", "rounds.max_attempts": 2}
    with pytest.raises(QuorumError, match=r"2 times.*trusted site is missing; expected site-99"):
        run(tmp_path, InProcessGrid(members()), **settings, **{"transport.kind": "flower"})
