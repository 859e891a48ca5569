"""The site's end of the update stream: fetch a state, push an update, whatever the connection does meanwhile."""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

import grpc

from fedllm.errors import CorruptPayloadError, TransportError, explain
from fedllm.wire import updates_pb2 as pb
from fedllm.wire.digest import digest_file
from fedllm.wire.files import clear_disk_errors
from fedllm.wire.framing import READ_AHEAD, Framer, append_chunks, read_chunk
from fedllm.wire.memory import keep_freed_buffers
from fedllm.wire.methods import CLIENT_OPTIONS, PORT_KEY, Stub
from fedllm.wire.part import Part, Receipt
from fedllm.wire.patience import Patience, Watch
from fedllm.wire.status import Reason, RefusedError, judge
from fedllm.wire.tls import TlsConfig, channel_credentials

logger = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

QUICK_CALL_S = 30.0
NO_TICKET = "fedllm-no-ticket"
LOOPBACK = ("127.", "localhost:", "[::1]:")

Progress = Callable[[int, int], None]
"""Called with bytes verified or sent so far, and bytes of the whole."""


class UpdateClient:
    """Moves files to and from one update server. Holds no connection between calls, so a process may fork.

    Args:
        address: ``host:port`` of the server, or of the gateway in front of it.
        tls: Certificates, or None.
        insecure: Allow plaintext; exactly one of ``tls`` and this must be set.
        port: Port of the update server behind a gateway, which routes by it; None where there is no gateway.
        deadline_s: Seconds for one transfer with all its attempts.
        quiet_s: Seconds of failing without a byte of progress after which a transfer is given up.
        stall_s: Seconds without a chunk after which a connection is given up for a new one.
        should_stop: Asked several times a second, from other threads too; true ends the transfer with CancelledError.
        progress: Told after every chunk.

    Raises:
        ConfigError: Certificates are wrong, or plaintext was not allowed.
    """

    def __init__(
        self,
        address: str,
        *,
        tls: TlsConfig | None = None,
        insecure: bool = False,
        port: int | None = None,
        deadline_s: float = 3600.0,
        quiet_s: float = 300.0,
        stall_s: float = 60.0,
        should_stop: Callable[[], bool] = lambda: False,
        progress: Progress = lambda _done, _whole: None,
    ) -> None:
        keep_freed_buffers()
        self.address = address
        self._credentials = channel_credentials(tls, insecure=insecure)
        self._metadata = ((PORT_KEY, str(port)),) if port is not None else ()
        self._deadline_s, self._quiet_s, self._stall_s = deadline_s, quiet_s, stall_s
        self._should_stop, self._progress = should_stop, progress

    def fetch(self, ticket: str, destination: Path, expected: Receipt) -> Path:
        """Write a state to a file: whole and verified, or not at all.

        What arrived before a failure stays beside the destination and is not asked for again, also by a later call.

        Args:
            ticket: Allows this fetch.
            destination: The file; replaced if it exists.
            expected: Size and digest as the server announced them in its authenticated message.

        Raises:
            TicketError: The server does not honour the ticket.
            CorruptPayloadError: The server holds another state than announced.
            TransportError: It could not be had in time, or the disk refused.
            CancelledError: The round was closed, or ``should_stop`` said so.
        """
        patience = Patience(self._deadline_s, self._quiet_s, self._should_stop)
        with _part_of(destination, expected) as part:
            is_resumed = part.size > 0
            self._persist(patience, partial(self._fetch_once, ticket, part, patience))
            try:
                part.finish()
            except CorruptPayloadError:
                if not is_resumed:
                    raise
                return self.fetch(ticket, destination, expected)  # what an earlier call left was bad, and is gone
        self._confirm(ticket)
        return destination

    def push(self, ticket: str, source: Path, announced: Receipt, checksums: Sequence[int] = ()) -> None:
        """Deliver a file; on return the server has verified it and holds it in a file. The file stays the caller's.

        Args:
            ticket: Allows this push.
            source: The file; must not change meanwhile.
            announced: Its size and digest.
            checksums: Those of its blocks, if they are known.

        Raises:
            TicketError: The server does not honour the ticket, or it allows fewer bytes.
            CorruptPayloadError: The file is not what is announced.
            TransportError: It could not be delivered in time, or the server cannot store it.
            CancelledError: The round was closed, or ``should_stop`` said so.
        """
        with clear_disk_errors(source):
            size = source.stat().st_size
        if size != announced.size:
            raise _mismatch(source, announced, f"{size} bytes")
        patience = Patience(self._deadline_s, self._quiet_s, self._should_stop)
        sender = _Sender(ticket, source, announced, checksums, self._progress)
        self._persist(patience, partial(self._push_once, sender, patience))

    def probe(self, timeout_s: float = QUICK_CALL_S) -> None:
        """Present a ticket that nobody issued; return when the update server itself has refused it.

        That proves the way there: network, TLS, gateway and protocol. It proves nothing about real tickets.

        Args:
            timeout_s: Seconds to wait for the refusal.

        Raises:
            TransportError: Something else happened, such as no connection.
        """
        try:
            with self._channel() as channel:
                announcement = pb.Announcement(ticket=NO_TICKET)
                Stub(channel).push_status(announcement, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            verdict = judge(error, self.address)
            if verdict.reason is Reason.TICKET:
                return
            raise verdict.error from error
        raise TransportError(explain("a ticket that nobody issued was taken", where=self.address))

    def _persist(self, patience: Patience, attempt: Callable[[Stub], ResultT]) -> ResultT:
        """Make attempts, each with a new connection, until one succeeds or trying again is of no use."""
        while True:
            patience.check()
            try:
                with self._channel() as channel:
                    return attempt(Stub(channel))
            except (grpc.RpcError, grpc.FutureCancelledError, RefusedError) as error:
                patience.check()
                verdict = judge(error, self.address)
                if not verdict.is_retryable:
                    raise verdict.error from error
                logger.info("a transfer was interrupted and goes on: %s", verdict.error)
                patience.pause(verdict.error)

    def _fetch_once(self, ticket: str, part: Part, patience: Patience, stub: Stub) -> None:
        if not part.missing:
            return
        request = pb.FetchRequest(ticket=ticket, offset=part.size)
        call = stub.fetch(request, timeout=patience.remaining_s, metadata=self._metadata)
        waiting: list[bytes] = []
        with Watch(call, self._stall_s, patience) as watch, ThreadPoolExecutor(1) as disk:
            writing = disk.submit(lambda: None)
            try:
                for message in call:
                    watch.moved()
                    waiting.append(message)
                    if writing.done() or len(waiting) == READ_AHEAD:
                        writing.result()
                        writing, waiting = disk.submit(self._take, part, waiting, patience), []
            finally:
                writing.result()
                self._take(part, waiting, patience)
        if part.missing:
            raise RefusedError(Reason.OUT_OF_STEP, f"The state ended {part.missing} bytes too early.")

    def _take(self, part: Part, messages: list[bytes], patience: Patience) -> None:
        append_chunks(part, map(read_chunk, messages))
        if messages:
            patience.progressed()
            self._progress(part.size, part.announced.size)

    def _confirm(self, ticket: str) -> None:
        """Say that the state is here. It is, so nothing is lost if the server does not hear it."""
        try:
            with self._channel() as channel:
                request = pb.ConfirmRequest(ticket=ticket)
                Stub(channel).confirm(request, timeout=QUICK_CALL_S, metadata=self._metadata)
        except grpc.RpcError as error:
            logger.info("a fetch could not be confirmed: %s", judge(error, self.address).error)

    def _push_once(self, sender: _Sender, patience: Patience, stub: Stub) -> None:
        timeout_s = min(QUICK_CALL_S, patience.remaining_s)
        asking = stub.push_status.future(sender.announcement, timeout=timeout_s, metadata=self._metadata)
        with Watch(asking, self._stall_s, patience):
            status = asking.result()
        if status.delivered:
            return
        if sender.go_on_at(status.offset):
            patience.progressed()
        sending = stub.push.future(sender.messages(), timeout=patience.remaining_s, metadata=self._metadata)
        with Watch(sending, self._stall_s, patience) as watch:
            sender.on_chunk = watch.moved
            try:
                sending.result()
            except (grpc.RpcError, grpc.FutureCancelledError) as error:
                sender.check(judge(error, self.address).reason)
                raise

    @contextlib.contextmanager
    def _channel(self) -> Iterator[grpc.Channel]:
        direct = [("grpc.enable_http_proxy", 0)] if self.address.startswith(LOOPBACK) else []
        options = CLIENT_OPTIONS + direct
        if self._credentials is None:
            channel = grpc.insecure_channel(self.address, options)
        else:
            channel = grpc.secure_channel(self.address, self._credentials, options)
        try:
            yield channel
        except BaseException:
            # Closing waits for bytes that are on their way, on a dead connection until it times out.
            threading.Thread(target=channel.close, name="update-close", daemon=True).start()
            raise
        channel.close()


@contextlib.contextmanager
def _part_of(destination: Path, expected: Receipt) -> Iterator[Part]:
    """Open what an earlier call left of the same payload, and remove what is left of others."""
    path = destination.with_name(f"{destination.name}.{expected.digest}.part")
    with clear_disk_errors(path):
        for other in destination.parent.glob(f"{glob.escape(destination.name)}.*.part"):
            if other != path:
                other.unlink()
    with Part(path, expected, lambda part: os.replace(part, destination)) as part:
        yield part


def _mismatch(source: Path, announced: Receipt, found: str) -> CorruptPayloadError:
    return CorruptPayloadError(
        explain("a file is not what is announced", expected=announced, found=found, where=source)
    )


class _Sender:
    """Reads a file into the messages of a push."""

    def __init__(
        self, ticket: str, source: Path, announced: Receipt, checksums: Sequence[int], progress: Progress
    ) -> None:
        self.announcement = pb.Announcement(ticket=ticket, size=announced.size, digest=announced.digest)
        self.on_chunk: Callable[[], None] = lambda: None
        self._source, self._announced, self._checksums, self._progress = source, announced, checksums, progress
        self._error: Exception | None = None

    def go_on_at(self, offset: int) -> bool:
        """Begin the next messages at an offset; tell whether it is farther than the last one."""
        is_farther = offset > self.announcement.offset
        self.announcement.offset = offset
        return is_farther

    def messages(self) -> Iterator[pb.PushRequest | bytes]:
        """Yield the announcement and the chunks behind its offset. gRPC asks for them in a thread of its own."""
        yield pb.PushRequest(announcement=self.announcement)
        try:
            with clear_disk_errors(self._source):
                yield from self._chunks(self.announcement.offset)
        except TransportError as error:
            self._error = error
            raise

    def check(self, reason: Reason | None) -> None:
        """Raise what a failed push was this end's own fault for, if it was."""
        if self._error is not None:
            raise self._error
        if reason is Reason.CORRUPT and (found := digest_file(self._source)) != self._announced.digest:
            raise _mismatch(self._source, self._announced, found)

    def _chunks(self, offset: int) -> Iterator[bytes]:
        framer = Framer(is_push=True)
        with self._source.open("rb", buffering=0) as file:
            while offset < self._announced.size:
                message, num_bytes = framer.read(file.fileno(), offset, self._announced.size, self._checksums)
                yield message
                offset += num_bytes
                self.on_chunk()
                self._progress(offset, self._announced.size)
