"""FFA-LoRA and RoLoRA through the whole round loop: what moves, what travels, what a resumed run remembers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedllm.messages import AnyMessage, TrainInstruction
from fedllm.model.initial import initial_arrays
from fedllm.runs import RunFolder
from fedllm.update import Arrays
from fedllm.wire.transport import Envelope
from fedllm.work import ClientWork
from tests.fake_federation import LAYOUT, InProcessGrid, QuadraticSite
from tests.unit.test_loop import LOSSY, TRANSPORTS, assert_close, events, params, run, sites

A, B = LAYOUT.names


def run_named(home: Path, strategy: str, **changes: Any) -> RunFolder:
    return run(home, InProcessGrid(sites()), **{"strategy.name": strategy, **changes})


def expected(phases: list[list[str]]) -> Arrays:
    """Move the named tensors half-way to the weighted mean of the optima, round by round, in float64."""
    members = [site for site in sites().values() if isinstance(site, QuadraticSite)]
    total = sum(site.num_examples for site in members)
    state = {name: value.astype(np.float64) for name, value in initial_arrays(LAYOUT, 42).items()}
    for names in phases:
        for name in names:
            mean = sum(site.num_examples / total * site.optimum[name].astype(np.float64) for site in members)
            state[name] = state[name] + 0.5 * (mean - state[name])
    return {name: value.astype(np.float32) for name, value in state.items()}


@pytest.mark.parametrize("kind", TRANSPORTS)
def test_ffa_moves_b_and_leaves_every_bit_of_a(kind: str, tmp_path: Path) -> None:
    found = params(run_named(tmp_path, "ffa-lora", **{"transport.kind": kind}))
    np.testing.assert_array_equal(found[A], initial_arrays(LAYOUT, 42)[A])
    assert_close(found, expected([[B]] * 3))


@pytest.mark.parametrize("kind", TRANSPORTS)
def test_rolora_moves_b_then_a(kind: str, tmp_path: Path) -> None:
    assert_close(params(run_named(tmp_path, "rolora", **{"transport.kind": kind})), expected([[B], [A], [B]]))


@pytest.mark.parametrize("downlink", ["delta|fp32", "delta|int8:8"])
def test_half_of_the_adapter_travels(downlink: str, tmp_path: Path) -> None:
    """Of 12 + 10 values, FFA-LoRA sends the 10 of B, RoLoRA 10 and 12 in turn; a payload's head is the same size."""
    sizes = {}
    for strategy in ("fedavg", "ffa-lora", "rolora"):
        settings = {"num_rounds": 4, "transport.downlink": downlink}
        folder = run_named(tmp_path / strategy, strategy, **settings)
        up = [event["bytes_up"] for event in events(folder, "round")]
        down = [event["bytes_down"] for event in events(folder, "evaluation")][1:]
        sizes[strategy] = (up, down)
    all_up, all_down = sizes["fedavg"]
    for strategy, missing in (("ffa-lora", [12] * 4), ("rolora", [12, 10, 12, 10])):
        up, down = sizes[strategy]
        row = 3 * 16  # of the table of segments, in each of three sites' updates
        assert [whole - part for whole, part in zip(all_up, up, strict=True)] == [3 * 4 * n + row for n in missing]
        assert all(part < whole for whole, part in zip(all_down, down, strict=True))


@pytest.mark.parametrize("strategy", ["ffa-lora", "rolora"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_resumed_run_gives_the_same_bits(strategy: str, optimizer: str, tmp_path: Path) -> None:
    changes = {
        **LOSSY,
        "strategy.name": strategy,
        "strategy.server_optimizer": optimizer,
        "strategy.server_momentum": 0.5,
        "strategy.server_learning_rate": 0.3,
    }
    clean = params(run(tmp_path / "clean", InProcessGrid(sites()), num_rounds=5, **changes))
    for num_rounds in (1, 2, 4, 5):
        resume = {"name": "", "resume": "test"} if num_rounds > 1 else {}
        folder = run(tmp_path / "cut", InProcessGrid(sites()), num_rounds=num_rounds, **changes, **resume)
    for name, value in clean.items():
        np.testing.assert_array_equal(params(folder)[name], value)


@pytest.mark.parametrize("strategy", ["ffa-lora", "rolora"])
@pytest.mark.parametrize("downlink", ["fp32", "int8:8", "delta|int8:8"])
def test_a_site_that_comes_late_gets_the_same_state(strategy: str, downlink: str, tmp_path: Path) -> None:
    grid, late = InProcessGrid(sites(2)), QuadraticSite("site-9", 9)
    early = grid.handlers[100]
    assert isinstance(early, QuadraticSite)

    def bring_late(message: Any) -> Any:
        if message.metadata.group_id == "round-3":
            grid.handlers[109] = late
        return early(message)

    grid.handlers[100] = bring_late
    settings = {"transport.downlink": downlink, "evaluation.local_only": False, "evaluation.prompt": ""}
    folder = run(tmp_path, grid, num_rounds=5, **{"strategy.name": strategy, **settings})
    assert "site-9" in events(folder, "round")[-1]["participants"]
    assert late.deliveries[0] == "full"
    assert late.held.keys() == early.held.keys()


class Generous(QuadraticSite):
    """A site that sends all it has, whatever was asked."""

    def train(self, instruction: TrainInstruction, envelope: Envelope) -> tuple[AnyMessage, Envelope | None]:
        return super().train(instruction.model_copy(update={"work": ClientWork()}), envelope)


@pytest.mark.parametrize("strategy", ["ffa-lora", "rolora"])
def test_an_update_with_tensors_that_were_not_asked_for_is_refused(strategy: str, tmp_path: Path) -> None:
    handlers = {**sites(), 109: Generous("site-9", 9)}
    folder = run(tmp_path, InProcessGrid(handlers), **{"strategy.name": strategy})
    clean = params(run_named(tmp_path / "clean", strategy))
    for event in events(folder, "round"):
        assert "another layout" in event["rejected"][0]["reason"]
    for name, value in clean.items():
        np.testing.assert_array_equal(params(folder)[name], value)
