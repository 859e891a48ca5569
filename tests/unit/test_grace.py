"""Semi-synchronous rounds: a quorum and a grace period close a round before its deadline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server_app.exchange import Deadline
from tests.fake_federation import InProcessGrid
from tests.unit.test_loop import events, params, run, sites

QUIET = {"rounds.deadline_s": 60.0, "evaluation.local_only": False, "evaluation.prompt": "", "num_rounds": 1}


class TrainingDelays(InProcessGrid):
    """A grid on which some nodes' training takes longer, and nothing else."""

    def __init__(self, delays: dict[int, float], count: int = 4) -> None:
        super().__init__(sites(count))
        self.training_delays = delays

    def push_messages(self, messages: Any) -> list[str]:
        ids = []
        for message in messages:
            is_training = message.metadata.message_type == "train"
            self.delays = self.training_delays if is_training else {}
            ids += super().push_messages([message])
        return ids


def participants(folder: Any) -> list[list[str]]:
    return [event["participants"] for event in events(folder, "round")]


def test_a_round_closes_when_the_grace_after_the_quorum_is_over(tmp_path: Path) -> None:
    grid = TrainingDelays({102: 0.3, 103: 30.0})
    folder = run(tmp_path, grid, **QUIET, **{"rounds.grace_s": 3.0})
    assert participants(folder) == [["site-0", "site-1", "site-2"]]
    [rejected] = events(folder, "round")[0]["rejected"]
    assert rejected == {"site": "site-3", "reason": "no reply before the round closed", "kind": "Silent"}


def test_the_grace_begins_with_the_quorum_and_not_before(tmp_path: Path) -> None:
    """Three of four are needed and two are slow: one grace period alone would not have been enough."""
    grid = TrainingDelays({101: 1.5, 102: 1.5, 103: 40.0})
    folder = run(tmp_path, grid, **QUIET, **{"rounds.grace_s": 0.5, "rounds.min_sites": 3})
    assert participants(folder) == [["site-0", "site-1", "site-2"]]


def test_without_grace_every_site_is_waited_for(tmp_path: Path) -> None:
    folder = run(tmp_path, TrainingDelays({103: 2.0}), **QUIET)
    assert participants(folder) == [["site-0", "site-1", "site-2", "site-3"]]


def test_with_all_sites_in_time_grace_changes_no_bit(tmp_path: Path) -> None:
    one = params(run(tmp_path / "1", InProcessGrid(sites()), **{"rounds.grace_s": 20.0}))
    two = params(run(tmp_path / "2", InProcessGrid(sites())))
    for name, value in one.items():
        np.testing.assert_array_equal(two[name], value)


def test_a_deadline_only_comes_nearer() -> None:
    deadline = Deadline(100.0)
    assert deadline.left_s == pytest.approx(100, abs=5)
    deadline.cut(50.0)
    deadline.cut(80.0)
    assert deadline.left_s == pytest.approx(50, abs=5)
    deadline.cut(-1.0)
    assert deadline.left_s < 0
