"""Which rounds are open, and the transfers under way in each. Lives in the server's event loop, needs no locks."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from fedllm.errors import TicketError, explain
from fedllm.wire.status import Reason, RefusedError
from fedllm.wire.ticket import Ticket


@dataclass
class _Round:
    """An open round.

    Attributes:
        attempt: Tickets of this attempt pass.
        transfers: Tasks under way, each with a future that is done when its transfer has ended.
        sent: Bytes sent by ticket id.
    """

    attempt: int
    transfers: dict[asyncio.Task[object], asyncio.Future[None]] = field(default_factory=dict)
    sent: Counter[str] = field(default_factory=Counter)


class Rounds:
    """Open rounds and their transfers.

    Args:
        max_transfers: Transfers at one time, over all rounds.
        queue_s: Seconds that one more waits for its turn.
        on_idle: Called when the last transfer under way has ended.
    """

    def __init__(self, max_transfers: int, queue_s: float, on_idle: Callable[[], object] = lambda: None) -> None:
        self._rounds: dict[int, _Round] = {}
        self._turns = asyncio.Semaphore(max_transfers)
        self._queue_s, self._on_idle = queue_s, on_idle

    async def open(self, round_: int, attempt: int) -> None:
        """Admit tickets of one attempt at a round; those of an earlier attempt are closed first."""
        await self.close(round_)
        self._rounds[round_] = _Round(attempt)

    async def close(self, round_: int) -> None:
        """Admit no more tickets of a round, cancel its transfers and wait until they have let go of their files."""
        if (closed := self._rounds.pop(round_, None)) is not None:
            await _cancel(closed)

    async def interrupt(self) -> None:
        """Cancel all transfers, as a connection that breaks would, and wait until they have let go of their files."""
        for current in self._rounds.values():
            await _cancel(current)

    def admit(self, ticket: Ticket) -> _Round:
        """Let a ticket pass if its round is open in the attempt that it was issued for.

        Raises:
            RefusedError: It is not.
        """
        current = self._rounds.get(ticket.round_)
        if current is None or current.attempt != ticket.attempt:
            raise _closed_error(ticket)
        return current

    def charge(self, ticket: Ticket, num_bytes: int, limit: int) -> None:
        """Count bytes that a fetch has moved, resumptions included.

        Raises:
            TicketError: They are more than the limit.
            RefusedError: The round is not open.
        """
        sent = self.admit(ticket).sent
        sent[ticket.id] += num_bytes
        if sent[ticket.id] > limit:
            raise TicketError(explain(f"{ticket} is used up", expected=f"at most {limit} bytes sent"))

    @contextlib.asynccontextmanager
    async def transfer(self, ticket: Ticket) -> AsyncIterator[None]:
        """Count the current task as a transfer: it waits for its turn, and closing the round ends it.

        Raises:
            RefusedError: The round is not open or was closed meanwhile, or no turn came.
        """
        current = self.admit(ticket)
        task = asyncio.current_task()
        assert task is not None
        ended = current.transfers[task] = asyncio.get_running_loop().create_future()
        try:
            async with self._turn():
                yield
        except asyncio.CancelledError:
            if self._rounds.get(ticket.round_) is not current:
                raise _closed_error(ticket) from None
            raise
        finally:
            del current.transfers[task]
            ended.set_result(None)
            if not any(round_.transfers for round_ in self._rounds.values()):
                self._on_idle()

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._queue_s):
                await self._turns.acquire()
        except TimeoutError:
            raise RefusedError(Reason.BUSY, "Too many transfers are under way.") from None
        try:
            yield
        finally:
            self._turns.release()


async def _cancel(current: _Round) -> None:
    ended = list(current.transfers.values())
    for task in current.transfers:
        task.cancel()
    if ended:
        await asyncio.wait(ended)


def _closed_error(ticket: Ticket) -> RefusedError:
    return RefusedError(Reason.CLOSED, f"Round {ticket.round_} is closed for {ticket}.")
