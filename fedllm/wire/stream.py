"""Transport ``grpc``: payloads travel on the update stream, and only tickets inside Flower's messages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedllm.errors import OversizedPayloadError, TransportError, explain
from fedllm.wire.client import UpdateClient
from fedllm.wire.digest import survey_file
from fedllm.wire.files import clear_disk_errors
from fedllm.wire.part import Receipt
from fedllm.wire.server import UpdateServer
from fedllm.wire.spool import Spool
from fedllm.wire.transport import Envelope, Scalar

KIND = "grpc"


class StreamServerTransport:
    """Server end of transport ``grpc`` (see :class:`fedllm.wire.transport.ServerTransport`).

    Args:
        server: Runs; closed together with the transport.
        spool: The server's spool.
        advertise: ``host:port`` that sites connect to, for example a gateway's; empty for the server's own address.
        lifetime_s: Seconds for which tickets are good: the time that a site may take from instruction to last byte.
    """

    def __init__(self, server: UpdateServer, spool: Spool, *, lifetime_s: float, advertise: str = "") -> None:
        self._server, self._spool = server, spool
        self._lifetime_s = lifetime_s
        self._address = advertise or server.address
        self._open: set[int] = set()

    def open_round(self, round_: int) -> None:
        """Begin a round afresh."""
        self._server.open_round(round_)
        self._open.add(round_)

    def publish(self, state_id: str, payload: Path) -> None:
        """Let fetch tickets name a file."""
        self._server.publish(state_id, payload)

    def offer(self, *, round_: int, site: str, state_id: str | None, max_update_bytes: int) -> Envelope:
        """Issue the tickets that one site needs."""
        self._check_open(round_, "offer")
        fields: dict[str, Scalar] = {"transport": KIND, "address": self._address, "port": self._server.port}
        fields["max-update-bytes"] = max_update_bytes
        if state_id is not None:
            state = self._server.published(state_id)
            fields |= {"state-size": state.size, "state-digest": state.digest}
            fields["fetch-ticket"] = self._server.issue(
                round_=round_,
                site=site,
                direction="fetch",
                max_bytes=state.size,
                lifetime_s=self._lifetime_s,
                state_id=state_id,
            )
        if max_update_bytes > 0:
            fields["push-ticket"] = self._server.issue(
                round_=round_, site=site, direction="push", max_bytes=max_update_bytes, lifetime_s=self._lifetime_s
            )
        return Envelope(fields)

    def receive(self, *, round_: int, site: str, reply: Envelope) -> Path:
        """Take the update that the reply announces from the spool."""
        self._check_open(round_, "receive")
        announced = Receipt(reply.get("size", int), reply.get("digest", str))
        return self._spool.take(round_, site, announced)

    def close_round(self, round_: int) -> None:
        """Cancel the round's transfers."""
        self._open.discard(round_)
        self._server.close_round(round_)

    def close(self) -> None:
        """Stop the server."""
        self._server.stop()

    def _check_open(self, round_: int, where: str) -> None:
        if round_ not in self._open:
            raise TransportError(explain(f"round {round_} is not open", where=where))


class StreamClientTransport:
    """Client end of transport ``grpc`` (see :class:`fedllm.wire.transport.ClientTransport`).

    Args:
        connect: Makes a client for an address and a port, with the site's certificates and patience, for example
            ``partial(UpdateClient, tls=TlsConfig(ca=...))``.
        address: What the site's admin has set to connect to; empty takes the instruction's.
    """

    def __init__(self, connect: Callable[..., UpdateClient], address: str = "") -> None:
        self._connect, self._address = connect, address

    def fetch(self, instruction: Envelope, destination: Path) -> Path:
        """Stream the offered state into a file."""
        expected = Receipt(instruction.get("state-size", int), instruction.get("state-digest", str))
        return self._client(instruction).fetch(instruction.get("fetch-ticket", str), destination, expected)

    def push(self, instruction: Envelope, payload: Path) -> Envelope:
        """Stream a file to the server and return its receipt."""
        limit = instruction.get("max-update-bytes", int)
        with clear_disk_errors(payload):
            digest, checksums = survey_file(payload)
            announced = Receipt(payload.stat().st_size, digest)
        if announced.size > limit:
            raise OversizedPayloadError(
                explain("an update is too large", expected=f"at most {limit} bytes", found=announced.size)
            )
        self._client(instruction).push(instruction.get("push-ticket", str), payload, announced, checksums)
        return Envelope({"transport": KIND, "size": announced.size, "digest": announced.digest})

    def _client(self, instruction: Envelope) -> UpdateClient:
        return self._connect(self._address or instruction.get("address", str), port=instruction.get("port", int))
