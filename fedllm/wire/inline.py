"""Transport ``flower``: a payload travels as one block of bytes inside Flower's own message.

For sites that may open a single port. Flower keeps every message in memory at both ends and at the SuperLink, so this
suits updates up to some hundred megabytes. What arrives goes through the same spool, with the same checks, as a stream.
"""

from __future__ import annotations

from pathlib import Path

from fedllm.errors import CorruptPayloadError, OversizedPayloadError, TransportError, TruncatedPayloadError, explain
from fedllm.wire.digest import digest_bytes
from fedllm.wire.files import clear_disk_errors
from fedllm.wire.part import Receipt
from fedllm.wire.spool import Spool
from fedllm.wire.transport import Envelope, Scalar

KIND = "flower"


class InlineServerTransport:
    """Server end of transport ``flower`` (see :class:`fedllm.wire.transport.ServerTransport`).

    Args:
        spool_folder: Where received updates are put.
    """

    def __init__(self, spool_folder: Path) -> None:
        self._spool = Spool(spool_folder)
        self._published: dict[str, Path] = {}
        self._packed: tuple[str, Envelope] | None = None
        self._limits: dict[int, dict[str, int]] = {}

    def open_round(self, round_: int) -> None:
        """Begin a round afresh."""
        self._spool.discard_round(round_)
        self._limits[round_] = {}

    def publish(self, state_id: str, payload: Path) -> None:
        """Name a state that later offers may carry."""
        self._published[state_id] = payload
        self._packed = None

    def offer(self, *, round_: int, site: str, state_id: str | None, max_update_bytes: int) -> Envelope:
        """Pack the state, if any, and remember the limit."""
        if round_ not in self._limits:
            raise TransportError(explain(f"round {round_} is not open", where="offer"))
        self._limits[round_][site] = max_update_bytes
        fields: dict[str, Scalar] = {"transport": KIND, "max-update-bytes": max_update_bytes}
        if state_id is None:
            return Envelope(fields)
        state = self._pack(state_id)
        return Envelope(fields | dict(state.fields), state.blob)

    def receive(self, *, round_: int, site: str, reply: Envelope) -> Path:
        """Verify the reply's bytes and write them to the spool."""
        limit = self._limits.get(round_, {}).get(site)
        if not limit:
            raise TransportError(explain(f"no update of {site!r} is expected in round {round_}", where="receive"))
        announced, blob = _unpack(reply, where=f"reply of {site!r}")
        if announced.size > limit:
            raise _oversized(announced.size, limit, where=f"reply of {site!r}")
        self._spool.store(round_, site, blob, announced)
        return self._spool.take(round_, site, announced)

    def close_round(self, round_: int) -> None:
        """Accept nothing more of a round."""
        self._spool.discard_round(round_)
        self._limits.pop(round_, None)

    def close(self) -> None:
        """Drop what was published."""
        self._limits.clear()
        self._published.clear()
        self._packed = None

    def _pack(self, state_id: str) -> Envelope:
        """Return a state in a form that all sites share, so that it is read once and one copy serves a round."""
        if state_id not in self._published:
            raise TransportError(explain(f"state {state_id!r} is not published", where="offer"))
        if self._packed is None or self._packed[0] != state_id:
            self._packed = (state_id, _pack(self._published[state_id]))
        return self._packed[1]


class InlineClientTransport:
    """Client end of transport ``flower`` (see :class:`fedllm.wire.transport.ClientTransport`)."""

    def fetch(self, instruction: Envelope, destination: Path) -> Path:
        """Unpack the instruction's bytes into a file."""
        announced, blob = _unpack(instruction, where="instruction")
        if (found := digest_bytes(blob)) != announced.digest:
            raise CorruptPayloadError(explain("a state has another digest", expected=announced.digest, found=found))
        temporary = destination.with_name(destination.name + ".part")
        with clear_disk_errors(destination):
            temporary.write_bytes(blob)
            temporary.replace(destination)
        return destination

    def push(self, instruction: Envelope, payload: Path) -> Envelope:
        """Pack a file into the reply."""
        limit = instruction.get("max-update-bytes", int)
        size = payload.stat().st_size
        if size > limit:
            raise _oversized(size, limit, where="update")
        return _pack(payload)


def _pack(payload: Path) -> Envelope:
    with clear_disk_errors(payload):
        blob = payload.read_bytes()
    return Envelope({"transport": KIND, "size": len(blob), "digest": digest_bytes(blob)}, blob)


def _unpack(envelope: Envelope, where: str) -> tuple[Receipt, bytes]:
    """Return what a message announces and its bytes, which have the announced size; the digest is not checked yet."""
    announced = Receipt(envelope.get("size", int), envelope.get("digest", str))
    blob = envelope.blob or b""
    if len(blob) != announced.size:
        kind = TruncatedPayloadError if len(blob) < announced.size else OversizedPayloadError
        problem = "a message does not hold the payload that it announces"
        raise kind(explain(problem, expected=announced, found=f"{len(blob)} bytes", where=where))
    return announced, blob


def _oversized(size: int, limit: int, where: str) -> OversizedPayloadError:
    return OversizedPayloadError(
        explain("an update is too large", expected=f"at most {limit} bytes", found=size, where=where)
    )
