"""What the update server answers: the four methods of ``updates.proto``.

One event loop serves all streams, so a thousand slow sites cost a thousand small objects and no threads; everything that
touches the disk runs in a small pool. Of a stream there are at most two times READ_AHEAD chunks and gRPC's window in
memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import grpc.aio
from google.protobuf.message import DecodeError

from fedllm.errors import (
    CorruptPayloadError,
    FedLLMError,
    OversizedPayloadError,
    TicketError,
    TransportError,
    explain,
)
from fedllm.wire import updates_pb2 as pb
from fedllm.wire.files import clear_disk_errors
from fedllm.wire.framing import READ_AHEAD, Framer, append_chunks, read_push
from fedllm.wire.ledger import Ledger
from fedllm.wire.part import Part, Receipt
from fedllm.wire.rounds import Rounds
from fedllm.wire.spool import Spool
from fedllm.wire.status import METADATA_KEY, Reason, RefusedError
from fedllm.wire.ticket import Direction, Ticket, TicketKey

logger = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

_END: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # the stubs lack it

_SUSPICIOUS = {Reason.TICKET, Reason.MALFORMED, Reason.STORAGE}
"""What a person should look at; the rest belongs to connections that break and rounds that end."""

NUM_DISK_THREADS = 8
MAX_FETCHES = 4
MIN_FETCH_BYTES = 64 << 20
"""A fetch may move this many times its size, or these bytes if they are more, before its ticket counts as used even if it
was never confirmed. Connections that break and begin again need some."""


@dataclass(frozen=True)
class Published:
    """A state that can be fetched."""

    path: Path
    receipt: Receipt
    checksums: Sequence[int]


class _OfThread(threading.local):
    """What each thread of the disk pool has of its own, so that memory does not grow with streams."""

    def __init__(self) -> None:
        self.framer = Framer(is_push=False)


class UpdateService:
    """Implements :class:`fedllm.wire.methods.Service`.

    Args:
        spool: Where pushes go.
        ledger: Openings of rounds and spent tickets.
        key: Verifies tickets.
        run: The run that tickets must belong to.
        rounds: Which rounds are open.
        published: States by id; the server adds to it.
        stall_s: Seconds without a chunk after which a stream is ended.
        on_delivered: Called in the event loop with round, site and receipt when a push is complete.
    """

    def __init__(
        self,
        *,
        spool: Spool,
        ledger: Ledger,
        key: TicketKey,
        run: str,
        rounds: Rounds,
        published: dict[str, Published],
        stall_s: float,
        on_delivered: Callable[[int, str, Receipt], None],
    ) -> None:
        self._spool, self._ledger, self._key, self._run = spool, ledger, key, run
        self._rounds, self._published, self._stall_s = rounds, published, stall_s
        self._on_delivered = on_delivered
        self._of_thread = _OfThread()
        self._disk = ThreadPoolExecutor(NUM_DISK_THREADS, thread_name_prefix="update-disk")

    def close(self) -> None:
        """Wait for disk work under way; call after the server has stopped."""
        self._disk.shutdown()

    async def fetch(self, request: pb.FetchRequest, context: Any) -> None:
        """Send a published state from an offset on."""
        await self._answer(context, self._fetch(request, context))

    async def confirm(self, request: pb.ConfirmRequest, context: Any) -> pb.ConfirmReply:
        """Note that a fetch is complete; confirming twice does no harm."""
        return await self._answer(context, self._confirm(request))

    async def push_status(self, request: pb.Announcement, context: Any) -> pb.PushStatusReply:
        """Say how much of an update is here."""
        return await self._answer(context, self._push_status(request))

    async def push(self, _: Any, context: Any) -> pb.Receipt:
        """Receive an update, verify it, and acknowledge it."""
        return await self._answer(context, self._push(context))

    async def _fetch(self, request: pb.FetchRequest, context: Any) -> None:
        ticket = self._check(request.ticket, "fetch")
        async with self._rounds.transfer(ticket):
            if await self._on_disk(self._ledger.is_spent, ticket.round_, ticket.id):
                raise TicketError(explain(f"{ticket} was already used"))
            state = self._published.get(ticket.state_id)
            if state is None:
                raise RefusedError(Reason.UNKNOWN_STATE, explain(f"state {ticket.state_id!r} is not published"))
            _check_size(state.receipt.size, ticket)
            await self._send(state, request.offset, ticket, context)

    async def _send(self, state: Published, offset: int, ticket: Ticket, context: Any) -> None:
        """Write chunks to the stream; the next ones are read from the disk while these are on their way."""
        size = state.receipt.size
        with clear_disk_errors(state.path), state.path.open("rb", buffering=0) as file:
            reading = self._on_disk(self._read_chunks, file, offset, state)
            async with self._patience() as moved:
                while chunks := await reading:
                    start, offset = offset, offset + sum(num_bytes for _, num_bytes in chunks)
                    reading = self._on_disk(self._read_chunks, file, offset, state)
                    self._rounds.charge(ticket, offset - start, max(MAX_FETCHES * size, MIN_FETCH_BYTES))
                    for message, _ in chunks:
                        await context.write(message)
                        moved()

    def _read_chunks(self, file: RawIOBase, offset: int, state: Published) -> list[tuple[bytes, int]]:
        """Return the next chunks' messages from an offset on, with the bytes of the file in each; none at the end."""
        chunks: list[tuple[bytes, int]] = []
        while offset < state.receipt.size and len(chunks) < READ_AHEAD:
            chunks.append(self._of_thread.framer.read(file.fileno(), offset, state.receipt.size, state.checksums))
            offset += chunks[-1][1]
        return chunks

    async def _confirm(self, request: pb.ConfirmRequest) -> pb.ConfirmReply:
        ticket = self._check(request.ticket, "fetch")
        await self._on_disk(self._ledger.spend, ticket.round_, ticket.id)
        return pb.ConfirmReply()

    async def _push_status(self, request: pb.Announcement) -> pb.PushStatusReply:
        ticket = self._check(request.ticket, "push")
        return await self._on_disk(self._standing, ticket, _announced(request, ticket))

    def _standing(self, ticket: Ticket, announced: Receipt) -> pb.PushStatusReply:
        self._check_unused(ticket, announced)
        delivered = self._spool.receipt(ticket.round_, ticket.site) is not None
        return pb.PushStatusReply(offset=self._spool.held(ticket.round_, ticket.site, announced), delivered=delivered)

    async def _push(self, context: Any) -> pb.Receipt:
        async with self._patience():
            message = await context.read()
        announcement = _read_announcement(b"" if message is _END else message)
        ticket = self._check(announcement.ticket, "push")
        announced = _announced(announcement, ticket)
        await self._on_disk(self._check_unused, ticket, announced)
        async with self._rounds.transfer(ticket):
            part = await self._on_disk(self._spool.begin, ticket.round_, ticket.site, announced)
            if part is not None:
                await self._receive(part, announcement.offset, context)
        self._on_delivered(ticket.round_, ticket.site, announced)
        return pb.Receipt(size=announced.size, digest=announced.digest)

    async def _receive(self, part: Part, offset: int, context: Any) -> None:
        try:
            await self._fill(part, offset, context)
            await self._on_disk(part.finish)
        finally:
            self._disk.submit(part.close)

    async def _fill(self, part: Part, offset: int, context: Any) -> None:
        """Append the stream's chunks, written to the disk while more arrive."""
        if offset != part.size:
            raise RefusedError(Reason.OUT_OF_STEP, f"The push goes on at byte {part.size}, not {offset}.")
        waiting: list[bytes] = []
        writing = self._on_disk(lambda: None)
        async with self._patience() as moved:
            while (message := await context.read()) is not _END:
                moved()
                waiting.append(message)
                if writing.done() or len(waiting) == READ_AHEAD:
                    await writing
                    writing, waiting = self._on_disk(append_chunks, part, map(read_push, waiting)), []
        await writing
        await self._on_disk(append_chunks, part, map(read_push, waiting))
        if part.missing:
            raise RefusedError(Reason.OUT_OF_STEP, f"The push ended {part.missing} bytes too early.")

    def _check_unused(self, ticket: Ticket, announced: Receipt) -> None:
        """Let a push ticket pass unless another payload was delivered with it or with a sibling."""
        delivered = self._spool.receipt(ticket.round_, ticket.site)
        if delivered not in (None, announced):
            raise TicketError(explain(f"{ticket} was already used", expected=delivered, found=announced))

    def _check(self, text: str, direction: Direction) -> Ticket:
        ticket = self._key.verify(text, run=self._run, direction=direction)
        self._rounds.admit(ticket)
        return ticket

    @contextlib.asynccontextmanager
    async def _patience(self) -> AsyncIterator[Callable[[], None]]:
        """End what stands still; gives what is to be called whenever something has moved."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._stall_s) as limit:
                yield lambda: limit.reschedule(loop.time() + self._stall_s)
        except TimeoutError:
            raise RefusedError(Reason.STALLED, f"Nothing moved for {self._stall_s:g} s.") from None

    def _on_disk(self, function: Callable[..., ResultT], *args: object) -> asyncio.Future[ResultT]:
        """Start a function in the disk pool. Its error is lost if nobody awaits it, as after a cancellation."""
        future = asyncio.get_running_loop().run_in_executor(self._disk, function, *args)
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        return future

    async def _answer(self, context: Any, work: Awaitable[ResultT]) -> ResultT:
        """Await a method's work, and tell the caller why if it does not succeed."""
        try:
            return await work
        except FedLLMError as error:
            await _abort(context, _refusal(error))


def _read_announcement(message: bytes) -> pb.Announcement:
    try:
        request = pb.PushRequest.FromString(message)
    except DecodeError as error:
        raise RefusedError(Reason.MALFORMED, "A message cannot be read.") from error
    if request.WhichOneof("part") != "announcement":
        raise RefusedError(Reason.MALFORMED, "A push begins with its announcement.")
    return request.announcement


def _announced(announcement: pb.Announcement, ticket: Ticket) -> Receipt:
    _check_size(announcement.size, ticket)
    try:
        return Receipt(announcement.size, announcement.digest)
    except TransportError as error:
        raise RefusedError(Reason.MALFORMED, str(error)) from error


def _check_size(size: int, ticket: Ticket) -> None:
    if size > ticket.max_bytes:
        raise TicketError(explain(f"{ticket} allows fewer bytes", expected=f"at most {ticket.max_bytes}", found=size))


def _refusal(error: FedLLMError) -> RefusedError:
    """Say which reason an error is; paths on the server are not the caller's business."""
    match error:
        case RefusedError():
            return error
        case TicketError():
            return RefusedError(Reason.TICKET, str(error))
        case CorruptPayloadError():
            return RefusedError(Reason.CORRUPT, str(error))
        case OversizedPayloadError():
            return RefusedError(Reason.MALFORMED, str(error))
        case _ if isinstance(error.__cause__, OSError):
            logger.error("the spool failed: %s", error)
            return RefusedError(Reason.STORAGE, f"The server cannot use its spool: {error.__cause__.strerror}.")
        case _:
            return RefusedError(Reason.SUPERSEDED, str(error))


async def _abort(context: Any, refusal: RefusedError) -> NoReturn:
    level = logging.WARNING if refusal.reason in _SUSPICIOUS else logging.INFO
    logger.log(level, "refused %s: %s", context.peer(), refusal)
    await context.abort(refusal.code, str(refusal), ((METADATA_KEY, refusal.reason.value),))
    raise AssertionError("abort raises")
