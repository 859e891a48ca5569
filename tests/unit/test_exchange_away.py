"""A site that goes away in a round is asked again when it is back, and not before, as are all if the SuperLink forgot."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Error
from flwr.app import Message as FlowerMessage
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

import server_app.exchange
from tests.fake_federation import InProcessGrid
from tests.unit.test_loop import events, run, sites

QUIET = {"rounds.deadline_s": 60.0, "evaluation.local_only": False, "evaluation.prompt": "", "num_rounds": 1}
AWAY = 101


class StartedAnew(InProcessGrid):
    """A SuperLink that forgets half-sent messages to train, so many times, as one does that is started anew."""

    def __init__(self, num_times: int) -> None:
        super().__init__(sites(3))
        self.num_times = num_times

    def push_messages(self, messages: Any) -> list[str]:
        messages = list(messages)
        if self.num_times and messages[0].metadata.message_type == "train":
            self.num_times -= 1
            raise ObjectPushError("an object", 1, "a session")
        return super().push_messages(messages)


class Forgetful(InProcessGrid):
    """A grid on which one node goes away at its first training, and is seen again some time later or never."""

    def __init__(self, back_after_s: float) -> None:
        super().__init__(sites(3))
        self.back_after_s = back_after_s
        self.left_at = 0.0
        self.asked_while_away = 0

    @property
    def is_away(self) -> bool:
        return bool(self.left_at) and time.monotonic() - self.left_at < self.back_after_s

    def get_node_ids(self) -> list[int]:
        return [node for node in super().get_node_ids() if node != AWAY or not self.is_away]

    def push_messages(self, messages: Any) -> list[str]:
        ids = super().push_messages(messages := list(messages))
        for id_, message in zip(ids, messages, strict=True):
            if message.metadata.dst_node_id != AWAY or message.metadata.message_type != "train":
                continue
            self.asked_while_away += self.is_away
            self.left_at = self.left_at or time.monotonic()
            if self.is_away:
                error = Error(code=5, reason="Node Unavailable")
                self._replies[id_] = (0.0, FlowerMessage(error, reply_to=message))
        return ids


def test_a_site_that_comes_back_within_the_round_takes_part_in_it(tmp_path: Path) -> None:
    grid = Forgetful(back_after_s=1.5)
    [round_] = events(run(tmp_path, grid, **QUIET), "round")
    assert round_["participants"] == ["site-0", "site-1", "site-2"], round_["rejected"]
    assert grid.asked_while_away == 0
    assert round_["attempt"] == 1


def test_a_site_that_stays_away_does_not_hold_the_round_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_app.exchange, "AWAY_S", 1.0)
    [round_] = events(run(tmp_path, Forgetful(back_after_s=3600.0), **QUIET), "round")
    assert round_["participants"] == ["site-0", "site-2"]
    [rejected] = round_["rejected"]
    assert rejected["site"] == "site-1"
    assert "Node Unavailable" in rejected["reason"]


def test_what_waits_for_a_node_when_a_round_closes_is_never_sent(tmp_path: Path) -> None:
    grid = Forgetful(back_after_s=2.5)
    settings = {**QUIET, "rounds.grace_s": 0.3, "num_rounds": 1}
    [round_] = events(run(tmp_path, grid, **settings), "round")
    assert round_["rejected"] == [{"site": "site-1", "reason": "no reply before the round closed", "kind": "Silent"}]
    time.sleep(max(0.0, grid.left_at + 2.6 - time.monotonic()))
    assert grid.asked_while_away == 0


def test_messages_that_the_superlink_forgot_are_sent_again(tmp_path: Path) -> None:
    folder = run(tmp_path, StartedAnew(2), **QUIET)
    [round_] = events(folder, "round")
    assert round_["participants"] == ["site-0", "site-1", "site-2"]
    assert round_["attempt"] == 1
    assert folder.log.read_text().count("lost on their way to the SuperLink") == 2


def test_a_superlink_that_always_forgets_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(ObjectPushError):
        run(tmp_path, StartedAnew(100), **QUIET)
