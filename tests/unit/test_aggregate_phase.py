"""How the round loop hands spooled updates to an aggregation: one at a time, or all until the end."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import server_app.app
from fedllm.config import RunConfig, read_run_config
from fedllm.errors import QuorumError, UpdateError
from fedllm.runs import RunFolder
from fedllm.update import Arrays, Contribution, Layout
from server_app.app import open_run, run_federation
from server_app.checkpoint import load_latest
from strategies.aggregators import WeightedMean
from strategies.fedavg import fedavg
from strategies.slots import Aggregation, Measurements, Origin, Strategy, UpdateSource
from tests.fake_federation import InProcessGrid, QuadraticSite

SETTINGS = {
    "name": "test",
    "num_rounds": 2,
    "rounds.deadline_s": 120.0,
    "rounds.max_attempts": 2,
    "transport.uplink": "int8:64|zstd:3",
    "transport.downlink": "fp32",
}


@dataclass
class LateMean:
    """The weighted mean, read only in `finish`, three times over."""

    layout: Layout
    origin: Origin
    notes: list[dict[str, Any]]
    folded: list[tuple[UpdateSource, Contribution]] = field(default_factory=list)
    reads_until_finish = True

    def fold(self, update: UpdateSource, contribution: Contribution) -> None:
        self.folded.append((update, contribution))

    def finish(self) -> tuple[Arrays, Measurements]:
        for _ in range(3):
            mean = WeightedMean().start(self.layout, self.origin)
            for update, contribution in self.folded:
                mean.fold(update, contribution)
            found = mean.finish()
        self.notes.append({"received": self.origin.received, "updates": [update for update, _ in self.folded]})
        return found


@dataclass(frozen=True)
class Late:
    notes: list[dict[str, Any]]

    def start(self, layout: Layout, origin: Origin) -> Aggregation:
        return LateMean(layout, origin, self.notes)


class Refusing(LateMean):
    def finish(self) -> tuple[Arrays, Measurements]:
        raise UpdateError("The stars are not right.")


@dataclass(frozen=True)
class Refuses:
    def start(self, layout: Layout, origin: Origin) -> Aggregation:
        return Refusing(layout, origin, [])


def run(home: Path, transport: str, monkeypatch: pytest.MonkeyPatch, aggregator: Any = None) -> RunFolder:
    recipe: Callable[[RunConfig], Strategy] = fedavg
    if aggregator is not None:
        recipe = lambda config: dataclasses.replace(fedavg(config), aggregator=aggregator)  # noqa: E731
    monkeypatch.setattr(server_app.app, "build_strategy", recipe)
    config = read_run_config({**SETTINGS, "home": str(home), "transport.kind": transport})
    folder, effective, state = open_run(config)
    handlers = {100 + i: QuadraticSite(f"site-{i}", i, 10 * (i + 1)) for i in range(3)}
    run_federation(InProcessGrid(handlers), folder, effective, state, run_id=1, fixed_sites=True)
    return folder


def params(folder: RunFolder) -> Arrays:
    state = load_latest(folder.checkpoints)
    assert state is not None
    return state.params


@pytest.mark.parametrize("transport", ["grpc", "flower"])
def test_an_aggregation_may_read_every_update_again_until_it_is_finished(
    transport: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[dict[str, Any]] = []
    late = params(run(tmp_path / "late", transport, monkeypatch, Late(notes)))
    plain = params(run(tmp_path / "plain", transport, monkeypatch))
    for name in plain:
        np.testing.assert_array_equal(late[name], plain[name])
    assert len(notes) == 2
    with pytest.raises(ValueError, match="released"):
        notes[0]["updates"][0].read(next(iter(plain)))
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".payload", ".update")], "a spooled file stays"


def test_an_aggregation_knows_the_state_that_the_sites_started_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[dict[str, Any]] = []
    folder = run(tmp_path, "flower", monkeypatch, Late(notes))
    state = load_latest(folder.checkpoints)
    assert state is not None
    for name, value in notes[1]["received"].items():
        np.testing.assert_array_equal(value, state.sent[name])
        assert (notes[0]["received"][name] != value).any()


def test_updates_that_cannot_be_aggregated_make_an_attempt_in_vain_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(QuorumError, match=r"2 times.*The stars are not right"):
        run(tmp_path, "flower", monkeypatch, Refuses())
    rows = [json.loads(line) for line in (tmp_path / "runs" / "test" / "metrics.jsonl").read_text().splitlines()]
    attempts = [row for row in rows if row["event"] == "attempt"]
    assert [row["reason"] for row in attempts] == ["The stars are not right."] * 2
    assert attempts[0]["participants"] == ["site-0", "site-1", "site-2"]
    assert not [row for row in rows if row["event"] == "round"]
