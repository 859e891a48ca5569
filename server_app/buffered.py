"""Asynchronous training: sites go on training while the server moves each time its buffer of updates is full (FedBuff).

A *version* is the state after so many rounds. A site is given the newest version whenever it is free, works on it once, and
hands in a delta to that very version, however far the server has moved meanwhile; how far is its staleness. Therefore
versions stay open over rounds: their tickets, what they decode to, and whom they wait for. One is closed when all its sites
have answered, when it is too old (`rounds.max_staleness`), or when its sites have had `rounds.deadline_s`.

What a restart of the server loses is the work under way and the updates of a buffer that was not full; every site is asked
anew, from the checkpoint's version.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from server_app.arrivals import Arrivals, arrivals
from server_app.checkpoint import RunState
from server_app.dialogue import Dialogue
from server_app.events import LATE, SILENT
from server_app.exchange import POLL_S, Deadline, Reply
from server_app.federation import Federation, Stopwatch
from server_app.folding import Accepted
from server_app.roster import Member
from server_app.training import Harvest, Outcome, aggregate, round_event, take, training_dialogue

log = logging.getLogger(__name__)

_WINDOW = 1 << 20
"""Added to a version's round for the transport, where evaluations use the plain numbers at the same time."""


@dataclass
class Version:
    """A state that sites are at work on.

    Attributes:
        round: The round in which they were asked.
        arriving: What opens the updates that start from it.
        dialogue: The question to them.
        deadline: When they have had their time.
        pending: Nodes that have not answered, by message id.
        asked: Sites that were asked.
        bytes_told: Payload bytes offered that an event has told of.
    """

    round: int
    arriving: Arrivals
    dialogue: Dialogue
    deadline: Deadline
    pending: dict[str, int] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)
    bytes_told: int = 0

    def ask(self, sites: Mapping[str, Member]) -> None:
        """Ask further sites to train."""
        if sites:
            self.asked |= sites.keys()
            self.pending |= self.dialogue.send(sites)

    def tell_bytes(self) -> int:
        """Return the payload bytes offered since this was last called."""
        told, self.bytes_told = self.bytes_told, self.dialogue.bytes_down
        return self.bytes_told - told


class AsynchronousTraining:
    """Drives buffered rounds; what sites are at work on outlives a round.

    Args:
        federation: What the phases share; its strategy has a buffer.
        poll_s: Seconds between looks for replies.
    """

    def __init__(self, federation: Federation, poll_s: float = POLL_S) -> None:
        assert federation.strategy.buffer is not None, "the strategy says how large the buffer is"
        self._federation, self._buffer, self._poll_s = federation, federation.strategy.buffer, poll_s
        self._versions: dict[int, Version] = {}
        self._waiting: dict[str, Accepted] = {}

    def train_round(self, state: RunState, round_: int, attempt: int) -> RunState | None:
        """Fill the buffer and move the state along it.

        Args:
            state: The state after the round before.
            round_: The round, from 1.
            attempt: The attempt, from 1; updates that an attempt in vain has gathered count in the next.

        Returns:
            The state after the round, or None if too few updates came in time; the attempt is recorded either way.
        """
        federation, watch = self._federation, Stopwatch()
        harvest = Harvest(accepted=self._waiting)
        with watch.phase("broadcast"):
            federation.roster.admit()
            self._give_up_old(round_, harvest)
            newest = self._version(state, round_)
            newest.asked.intersection_update(harvest.accepted)  # a further attempt asks the others again
        with watch.phase("train"):
            newest.ask(self._free(newest))
            self._fill(newest, harvest)
        outcome = Outcome(None)
        if len(harvest.accepted) >= federation.config.rounds.min_sites:
            with watch.phase("aggregate"):
                outcome = aggregate(federation, state, harvest.accepted)
        bytes_down = sum(version.tell_bytes() for version in self._versions.values())
        federation.recorder.record(round_event(harvest, round_, attempt, newest.asked, watch, outcome, bytes_down))
        if outcome.moved is not None or outcome.reason:
            self._waiting.clear()
        if outcome.moved is not None and round_ == federation.config.num_rounds:
            self._drain()
        return outcome.moved

    def _version(self, state: RunState, round_: int) -> Version:
        """Return the newest version, opened once."""
        if round_ not in self._versions:
            federation, window = self._federation, _WINDOW + round_
            federation.transport.open_round(window)
            starts = federation.broadcaster.starts(state, federation.roster.members)
            dialogue = training_dialogue(federation, starts, round_, window=window, taken=self._taken)
            deadline = Deadline(federation.config.rounds.deadline_s)
            arriving = arrivals(federation, state, starts, round_)
            self._versions[round_] = Version(round_, arriving, dialogue, deadline)
            federation.exchange.watch(self._versions[round_].pending)
        return self._versions[round_]

    def _free(self, newest: Version) -> dict[str, Member]:
        """Return the sites that can begin to work on the newest version."""
        free = self._federation.roster.available()
        return {
            site: member for site, member in free.items() if site not in newest.asked and site in newest.arriving.starts
        }

    def _taken(self, site: str) -> int:
        """Return the round of a site's update in the buffer, which will be folded; 0 if it has none there."""
        return self._waiting[site].report.round if site in self._waiting else 0

    def _fill(self, newest: Version, harvest: Harvest) -> None:
        """Take replies as they come until the buffer is full, nobody is at work, or the time is over."""
        rounds = self._federation.config.rounds
        deadline = Deadline(rounds.deadline_s)
        while True:
            for version, site, reply in self._replies(harvest):
                take(self._federation, version.arriving, harvest, reply, site, window=_WINDOW + version.round)
                if version is not newest:
                    newest.ask({name: member for name, member in self._free(newest).items() if name == site})
                if len(harvest.accepted) >= self._buffer.size:
                    return
            if rounds.grace_s and len(harvest.accepted) >= rounds.min_sites:
                deadline.cut(rounds.grace_s)
            if deadline.left_s <= 0 or not any(version.pending for version in self._versions.values()):
                return
            time.sleep(max(0.0, min(self._poll_s, deadline.left_s)))

    def _replies(self, harvest: Harvest) -> Iterator[tuple[Version, str, Reply]]:
        """Yield the replies that are there; one of a site that has an update in the buffer waits for the next buffer."""
        for version in list(self._versions.values()):
            names = {member.node: site for site, member in self._federation.roster.members.items()}
            ready = {id_: node for id_, node in version.pending.items() if names.get(node) not in harvest.accepted}
            for reply in self._federation.exchange.pull(ready):
                for id_ in [id_ for id_, node in version.pending.items() if node == reply.node]:
                    del version.pending[id_]
                if (site := version.dialogue.settle(reply, version.pending)) is not None:
                    yield version, site, reply
        for late in self._federation.exchange.late():
            harvest.reject(self._federation.roster.name_of(late.node), LATE, "it answered a version that was given up")

    def _give_up_old(self, round_: int, harvest: Harvest) -> None:
        """Close versions that nobody is waited for any more, because all have answered or because it is too late."""
        for version in list(self._versions.values()):
            is_old = round_ - version.round > self._buffer.max_staleness
            if version.round == round_ or (version.pending and not is_old and version.deadline.left_s > 0):
                continue
            for node in version.pending.values():
                kind = LATE if is_old else SILENT
                why = f"later than {self._buffer.max_staleness} rounds" if is_old else "no answer within its time"
                harvest.reject(self._federation.roster.name_of(node), kind, f"asked in round {version.round}: {why}")
            self._close(version)

    def _close(self, version: Version) -> None:
        self._federation.exchange.give_up(version.pending)
        self._federation.transport.close_round(_WINDOW + version.round)
        del self._versions[version.round]

    def _drain(self) -> None:
        """Let sites finish what nobody needs any more, so that all can be evaluated."""
        rounds = self._federation.config.rounds
        deadline = Deadline(rounds.grace_s or rounds.deadline_s)
        while deadline.left_s > 0 and any(one.pending and one.deadline.left_s > 0 for one in self._versions.values()):
            for version in self._versions.values():
                for reply in self._federation.exchange.pull(version.pending):
                    site = self._federation.roster.name_of(reply.node)
                    log.info("%s is done with round %d after the end; its update is not needed", site, version.round)
            time.sleep(self._poll_s)
        for version in list(self._versions.values()):
            self._close(version)
