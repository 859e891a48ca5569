"""The update server of a run: an event loop in a thread of its own, driven by plain calls."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import grpc
import grpc.aio

from fedllm.errors import TransportError, explain
from fedllm.ports import free_ports, parse_ports
from fedllm.wire.digest import survey_file
from fedllm.wire.files import clear_disk_errors
from fedllm.wire.ledger import Ledger
from fedllm.wire.memory import keep_freed_buffers, return_freed_buffers, share_heaps
from fedllm.wire.methods import SERVER_OPTIONS, handler
from fedllm.wire.part import Receipt
from fedllm.wire.rounds import Rounds
from fedllm.wire.service import Published, UpdateService
from fedllm.wire.spool import Spool
from fedllm.wire.ticket import Direction, Ticket, TicketKey
from fedllm.wire.tls import TlsConfig, server_credentials

logger = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

STOP_S = 2.0


class UpdateServer:
    """Serves fetches and pushes to the sites of one run. Use as a context manager, or call :meth:`stop`.

    Args:
        spool: Where pushes go. A server that is started again on the same spool with the same key goes on where the
            last one ended.
        key: Issues and verifies tickets.
        run: The run's name, which every ticket carries.
        bind: Address to listen on.
        ports: Port or inclusive range; the first free one is taken.
        tls: Certificates, or None.
        insecure: Allow plaintext; exactly one of ``tls`` and this must be set.
        max_transfers: Transfers at one time; each takes up to 6 MiB of memory.
        queue_s: Seconds that one more waits for its turn before it is told to come back.
        stall_s: Seconds without a chunk after which a stream is ended.

    Raises:
        ConfigError: Certificates or ports are wrong, or plaintext was not allowed.
        TransportError: No port of the range is free.
    """

    def __init__(
        self,
        spool: Spool,
        key: TicketKey,
        run: str,
        *,
        bind: str = "127.0.0.1",
        ports: str = "9200-9299",
        tls: TlsConfig | None = None,
        insecure: bool = False,
        max_transfers: int = 256,
        queue_s: float = 30.0,
        stall_s: float = 120.0,
    ) -> None:
        self._spool, self._key, self._run = spool, key, run
        self._bind, self._ports = bind, parse_ports(ports)
        self._credentials = server_credentials(tls, insecure=insecure)
        self._max_transfers, self._queue_s, self._stall_s = max_transfers, queue_s, stall_s
        self._ledger = Ledger(spool.folder)
        keep_freed_buffers()
        share_heaps()
        self._published: dict[str, Published] = {}
        self._delivered = threading.Condition()
        self._stopped = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="update-server", daemon=True)
        self._thread.start()
        try:
            self.port = self._call(self._start())
        except BaseException:
            self._end_loop()
            raise
        logger.info("update server of run %s listens on %s", run, self.address)

    def __enter__(self) -> UpdateServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def address(self) -> str:
        """Where the server listens, ``host:port``."""
        return f"[{self._bind}]:{self.port}" if ":" in self._bind else f"{self._bind}:{self.port}"

    def open_round(self, round_: int, *, keep: bool = False) -> None:
        """Begin a round.

        Args:
            round_: Its number.
            keep: Go on with what an earlier server of the same run received, under the same tickets. Otherwise what an
                earlier attempt left is removed and its tickets are void.
        """
        if not keep:
            self._call(self._rounds.close(round_))
            self._spool.discard_round(round_)
            self._ledger.open_round(round_)
        self._call(self._rounds.open(round_, self._ledger.attempt(round_)))

    def close_round(self, round_: int) -> None:
        """Cancel a round's transfers and discard what was not taken from the spool. Closing twice does nothing."""
        self._call(self._rounds.close(round_))
        self._spool.discard_round(round_)

    def publish(self, state_id: str, path: Path) -> Receipt:
        """Make a file available to fetch tickets that name it. It stays the caller's and must not change."""
        with clear_disk_errors(path):
            digest, checksums = survey_file(path)
            receipt = Receipt(path.stat().st_size, digest)
        self._published[state_id] = Published(path, receipt, checksums)
        return receipt

    def published(self, state_id: str) -> Receipt:
        """Return size and digest of a published state.

        Raises:
            TransportError: It is not published.
        """
        if state_id not in self._published:
            raise TransportError(explain(f"state {state_id!r} is not published"))
        return self._published[state_id].receipt

    def issue(
        self, *, round_: int, site: str, direction: Direction, max_bytes: int, lifetime_s: float, state_id: str = ""
    ) -> str:
        """Return a ticket for the present attempt at a round (see :class:`fedllm.wire.ticket.Ticket`)."""
        return self._key.issue(
            Ticket(
                run=self._run,
                round_=round_,
                attempt=self._ledger.attempt(round_),
                site=site,
                direction=direction,
                max_bytes=max_bytes,
                expires_at=int(time.time() + lifetime_s) + 1,
                state_id=state_id,
            )
        )

    def wait_for(self, round_: int, site: str, timeout_s: float) -> Receipt | None:
        """Wait until a site's push is complete and return its receipt, or None when the time is up."""
        with self._delivered:
            self._delivered.wait_for(lambda: self._spool.receipt(round_, site) is not None, timeout_s)
        return self._spool.receipt(round_, site)

    def stop(self) -> None:
        """Stop listening and end transfers; what they held can be resumed by a later server. May be called twice."""
        if not self._stopped:
            self._stopped = True
            self._call(self._shut_down())
            self._service.close()
            self._end_loop()

    async def _start(self) -> int:
        self._rounds = Rounds(self._max_transfers, self._queue_s, self._when_idle)
        self._service = UpdateService(
            spool=self._spool,
            ledger=self._ledger,
            key=self._key,
            run=self._run,
            rounds=self._rounds,
            published=self._published,
            stall_s=self._stall_s,
            on_delivered=self._announce,
        )
        self._server = grpc.aio.server(options=SERVER_OPTIONS, maximum_concurrent_rpcs=4 * self._max_transfers)
        self._server.add_generic_rpc_handlers((handler(self._service),))
        port = self._listen()
        await self._server.start()
        return port

    def _when_idle(self) -> None:
        self._loop.run_in_executor(None, return_freed_buffers)

    async def _shut_down(self) -> None:
        """Stop within seconds; a connection on which bytes are stuck would hold gRPC until it times out."""
        stopping = asyncio.ensure_future(self._server.stop(None))
        await self._rounds.interrupt()
        await asyncio.wait([stopping], timeout=STOP_S)

    def _listen(self) -> int:
        host = f"[{self._bind}]" if ":" in self._bind else self._bind
        for port in free_ports(self._bind, self._ports):
            try:
                if self._credentials is None:
                    return self._server.add_insecure_port(f"{host}:{port}")
                return self._server.add_secure_port(f"{host}:{port}", self._credentials)
            except RuntimeError as error:
                logger.debug("port %d was taken meanwhile: %s", port, error)
        raise TransportError(
            explain(
                "the update server finds no free port",
                expected=f"one of {self._ports.start}-{self._ports.stop - 1}",
                where=self._bind,
                fix="Widen the range of ports, or end the runs that hold them.",
            )
        )

    def _announce(self, round_: int, site: str, receipt: Receipt) -> None:
        logger.debug("round %d: %r delivered %s", round_, site, receipt)
        with self._delivered:
            self._delivered.notify_all()

    def _call(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
