"""Messages to sites and their replies, one at a time: the only file here that talks to Flower's grid.

Flower's own ``send_and_receive`` polls every three seconds, collects all replies in a list, and checks its timeout only
between pulls. Here each message id is pulled by itself and each reply is handed on as it comes, so that one stalled reply
cannot hold the others' memory, and a late one is seen, named and dropped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from flwr.app import Message as FlowerMessage
from flwr.app import RecordDict
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

from fedllm.errors import TransportError
from fedllm.messages import AnyMessage, Failure, Instruction
from fedllm.records import from_records, to_records
from fedllm.wire.transport import Envelope

log = logging.getLogger(__name__)

POLL_S = 0.25
"""Seconds between looks for replies."""

AWAY_S = 90.0
"""Seconds for which a message waits for a node that is away: a SuperNode that was killed is let in again once its last
heartbeat has lapsed, after a minute at most, and starts anew."""

MAX_SENDS = 3
"""Times that messages are sent to the SuperLink. One that is started anew has forgotten what it had half of; a site that
got its message all the same does the work once and answers twice."""

_TYPES = {
    "hello": "query",
    "first-state": "query",
    "train": "train",
    "evaluate": "evaluate",
    "local-only": "train.local_only",
    "personalise": "train.personalise",
}


@dataclass(frozen=True)
class Reply:
    """What one site answered.

    Attributes:
        node: Flower's id of the site's node.
        message: The answer; a :class:`Failure` where the site, or Flower on its behalf, reported an error.
        envelope: What the transport added.
    """

    node: int
    message: AnyMessage
    envelope: Envelope


@dataclass(frozen=True)
class _Waiting:
    """A message that waits for its node."""

    node: int
    instruction: Instruction
    envelope: Envelope | None
    group: str
    until: float


class Deadline:
    """When waiting ends; it can be moved nearer while one waits.

    Args:
        timeout_s: Seconds from now.
    """

    def __init__(self, timeout_s: float) -> None:
        self._at = time.monotonic() + timeout_s

    @property
    def left_s(self) -> float:
        """Seconds that are left, negative where it has passed."""
        return self._at - time.monotonic()

    def cut(self, timeout_s: float) -> None:
        """End at most so many seconds from now."""
        self._at = min(self._at, time.monotonic() + timeout_s)


class Exchange:
    """Sends instructions and yields replies.

    Args:
        grid: Flower's grid.
        poll_s: Seconds between looks for replies.
    """

    def __init__(self, grid: Grid, poll_s: float = POLL_S) -> None:
        self._grid = grid
        self._poll_s = poll_s
        self._late: dict[str, int] = {}
        self._waiting: dict[str, _Waiting] = {}
        self._sent_as: dict[str, str] = {}
        self._watched: list[dict[str, int]] = []

    def online(self) -> set[int]:
        """Return the ids of the nodes that Flower sees now."""
        return set(self._grid.get_node_ids())

    def send(self, instructions: Mapping[int, tuple[Instruction, Envelope | None]], group: str) -> dict[str, int]:
        """Send one instruction to each node; return the node's id by message id.

        Args:
            instructions: Instruction and transport's part, by node id.
            group: Flower's group id, for its logs.
        """
        if not instructions:
            return {}
        for attempt in range(MAX_SENDS):
            messages = [
                FlowerMessage(to_records(*instruction), node, _TYPES[_kind(instruction[0])], group_id=group)
                for node, instruction in instructions.items()
            ]
            try:
                ids = list(self._grid.push_messages(messages))
                break
            except ObjectPushError as error:
                if attempt == MAX_SENDS - 1:
                    raise
                log.warning("messages were lost on their way to the SuperLink and are sent again: %s", error)
        if len(ids) != len(messages):
            log.warning("Flower took %d of %d messages; the other nodes are gone", len(ids), len(messages))
        by_id = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
        return {id_: by_id[id_] for id_ in ids if id_ in by_id}

    def send_when_back(
        self, node: int, instruction: Instruction, envelope: Envelope | None, group: str
    ) -> dict[str, int]:
        """Send to a node that may be away, as soon as it is back or has been away for :data:`AWAY_S`; as :meth:`send`."""
        if node in self.online():
            return self.send({node: (instruction, envelope)}, group)
        id_ = f"{group}: waits for {node} since {time.monotonic()}"
        self._waiting[id_] = _Waiting(node, instruction, envelope, group, time.monotonic() + AWAY_S)
        return {id_: node}

    def replies(self, pending: dict[str, int], deadline: Deadline) -> Iterator[Reply]:
        """Yield replies as they come, until all came or the deadline passed; what is left counts as late.

        Args:
            pending: What :meth:`send` returned; answered messages are removed from it.
            deadline: When waiting ends.
        """
        try:
            while pending:
                yield from self.pull(pending)
                if not pending or deadline.left_s <= 0:
                    return
                time.sleep(max(0.0, min(self._poll_s, deadline.left_s)))
        finally:
            self._postpone(pending)

    def pull(self, pending: dict[str, int]) -> Iterator[Reply]:
        """Yield the replies that are there now and remove them from `pending`."""
        self._send_waiting(pending)
        for id_ in [id_ for id_ in pending if id_ not in self._waiting]:
            for message in self._grid.pull_messages([self._sent_as.get(id_, id_)]):
                yield _read(message, pending.pop(id_))

    def _send_waiting(self, pending: dict[str, int]) -> None:
        """Send what waited long enough; what Flower does not take is no longer pending."""
        waiting = {id_: self._waiting[id_] for id_ in pending.keys() & self._waiting.keys()}
        online = self.online() if waiting else set()
        for id_, one in waiting.items():
            if one.node in online or time.monotonic() >= one.until:
                del self._waiting[id_]
                if sent := self.send({one.node: (one.instruction, one.envelope)}, one.group):
                    [self._sent_as[id_]] = sent
                else:
                    del pending[id_]

    def _postpone(self, pending: Mapping[str, int]) -> None:
        """Count what is pending as late; what was not even sent will not be."""
        unsent = {id_ for id_ in pending if self._waiting.pop(id_, None)}
        self._late.update({id_: node for id_, node in pending.items() if id_ not in unsent})

    def late(self) -> Iterator[Reply]:
        """Yield replies to messages whose time had passed, so that they can be named and dropped."""
        yield from self.pull(self._late)

    def watch(self, pending: dict[str, int]) -> None:
        """Count the nodes of `pending` as at work for as long as they are in it; :meth:`give_up` ends it."""
        self._watched.append(pending)

    def give_up(self, pending: dict[str, int]) -> None:
        """Wait no longer: what is left in `pending` counts as late."""
        self._watched = [other for other in self._watched if other is not pending]
        self._postpone(pending)
        pending.clear()

    @property
    def at_work(self) -> set[int]:
        """Nodes whose reply is still waited for, over the end of a round."""
        return {node for pending in self._watched for node in pending.values()}

    @property
    def busy(self) -> set[int]:
        """Nodes that still owe a reply, waited for or not."""
        return set(self._late.values()) | self.at_work


def _kind(instruction: Instruction) -> str:
    return str(getattr(instruction, "kind", ""))


def _read(message: FlowerMessage, node: int) -> Reply:
    """Turn Flower's reply into ours; what cannot be read becomes a :class:`Failure`."""
    if message.has_error():
        reason = f"Flower's error code {message.error.code}: {_first_line(message.error.reason)}"
        return Reply(node, Failure(site="", error="FlowerError", reason=reason), Envelope({}, None))
    try:
        read, envelope = from_records(_content(message), f"the reply of node {node}")
    except TransportError as error:
        return Reply(node, Failure(site="", error="TransportError", reason=str(error)), Envelope({}, None))
    return Reply(node, read, envelope)


def _content(message: FlowerMessage) -> RecordDict:
    return message.content


def _first_line(text: str | None) -> str:
    return (text or "no reason given").strip().splitlines()[0][:500]
