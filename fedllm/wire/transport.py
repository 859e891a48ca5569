"""What the round loop and the client ask of a transport, whichever way the bytes go.

Two transports implement these protocols: :mod:`fedllm.wire.inline` packs a payload into the one array of a Flower
message, :mod:`fedllm.wire.stream` sends it beside the message over gRPC. Both move opaque files; what is inside is a
matter of :mod:`fedllm.codecs`. One round looks like this::

    server                                               client
    transport.open_round(3)
    transport.publish("global-3", state_file)
    instruction = transport.offer(3, "clinic-a", ...)    --- Flower message --->
                                                         state = transport.fetch(instruction, folder / "state")
                                                         reply = transport.push(instruction, update_file)
    path = transport.receive(3, "clinic-a", reply)       <--- Flower message ---
    ...fold, then delete path...
    transport.close_round(3)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, TypeVar

from fedllm.errors import TransportError, explain

Scalar = str | int | float | bool
ScalarT = TypeVar("ScalarT", str, int)


@dataclass(frozen=True)
class Envelope:
    """What a transport puts into one Flower message: flat scalars and at most one packed block of bytes.

    Attributes:
        fields: Small named values; the names are the transport's own.
        blob: A payload's bytes, or None where they travel elsewhere.
    """

    fields: Mapping[str, Scalar] = field(default_factory=lambda: MappingProxyType({}))
    blob: bytes | None = None

    def get(self, name: str, kind: type[ScalarT]) -> ScalarT:
        """Return one field of a known type.

        Raises:
            TransportError: The field is missing or of another type.
        """
        value = self.fields.get(name)
        if type(value) is not kind:
            expected = f"{name!r} as {kind.__name__}"
            raise TransportError(explain("a message lacks a field", expected=expected, found=repr(value)))
        return value


class ServerTransport(Protocol):
    """The server's end. Methods may be called from one thread at a time."""

    def open_round(self, round_: int) -> None:
        """Begin a round afresh: what an earlier attempt at the same round left is void and removed."""

    def publish(self, state_id: str, payload: Path) -> None:
        """Make an encoded state available under a name. The file stays the caller's and must not change."""

    def offer(self, *, round_: int, site: str, state_id: str | None, max_update_bytes: int) -> Envelope:
        """Return what goes into the instruction to one site.

        Args:
            round_: An open round.
            site: The site's stable name.
            state_id: A published state to fetch, or None if the site needs none.
            max_update_bytes: The largest update that it may push, 0 if none is expected.
        """

    def receive(self, *, round_: int, site: str, reply: Envelope) -> Path:
        """Return the file that holds a site's update: complete, and equal to what the reply announces.

        The file becomes the caller's, who deletes it once it is folded.

        Raises:
            UpdateError: The payload is missing, cut, corrupt or too large.
            TransportError: The reply does not belong to an offer of this round.
        """

    def close_round(self, round_: int) -> None:
        """Cancel what is still under way and discard what was not received. Closing twice does nothing."""

    def close(self) -> None:
        """Stop; nothing can be used afterwards."""


class ClientTransport(Protocol):
    """The client's end, for one instruction at a time."""

    def fetch(self, instruction: Envelope, destination: Path) -> Path:
        """Write the offered state to a file, verified, and return its path.

        Raises:
            PayloadError: What arrived is not what was offered.
            TransportError: It could not be had.
            CancelledError: The round closed, or the caller asked to stop.
        """

    def push(self, instruction: Envelope, payload: Path) -> Envelope:
        """Deliver an update and return what goes into the reply. The file stays the caller's.

        Raises:
            OversizedPayloadError: The update is larger than the offer allows.
            TransportError: It could not be delivered.
            CancelledError: The round closed, or the caller asked to stop.
        """
