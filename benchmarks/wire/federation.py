"""A server and client processes that move payloads as in a round, without training and without Flower.

The server is this process, as the ServerApp's is: the update service in a thread, the fold beside it. Each client process
stands for one or more sites, which transfer at the same time.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.wire.adapter import encode, layout_of, open_update
from fedllm.update import Contribution, zeros
from fedllm.wire.client import UpdateClient
from fedllm.wire.server import UpdateServer
from fedllm.wire.spool import Spool
from fedllm.wire.stream import StreamClientTransport, StreamServerTransport
from fedllm.wire.ticket import TicketKey
from fedllm.wire.transport import Envelope
from strategies.aggregators import WeightedMean
from strategies.slots import Origin

STATE = "state"
MAX_UPDATE_BYTES = 1 << 32

_processes = multiprocessing.get_context("spawn")


class Federation:
    """A server and its client processes.

    Args:
        folder: For spools and payloads; best on a disk.
        megabytes: Size of the adapter in float32.
        num_clients: Sites.
        num_processes: Processes that share the sites.
        downlink: Pipeline of the state.
        uplink: Pipeline of the updates.
    """

    def __init__(
        self, folder: Path, megabytes: int, num_clients: int, num_processes: int, *, downlink: str, uplink: str
    ) -> None:
        self.layout = layout_of(megabytes)
        state = zeros(self.layout)
        self._origin, self._aggregator = Origin(1, self.layout, state, state), WeightedMean()
        self._state = encode(folder / "state.payload", self.layout, kind="state", pipeline=downlink, seed=0)
        spool = Spool(folder / "spool")
        server = UpdateServer(spool, TicketKey.generate(), "benchmark", ports="0", insecure=True)
        self.transport = StreamServerTransport(server, spool, lifetime_s=3600)
        groups = [
            [f"site-{index}" for index in range(first, num_clients, num_processes)] for first in range(num_processes)
        ]
        self._clients = [
            _Client(folder / f"client-{rank}", megabytes, sites, uplink) for rank, sites in enumerate(groups)
        ]

    def close(self) -> None:
        """End the processes and the server."""
        for client in self._clients:
            client.close()
        self.transport.close()

    def round(self) -> dict[str, float]:
        """Move the state down and the updates up, and average them; return the seconds of each phase."""
        self.transport.open_round(1)
        self.transport.publish(STATE, self._state)
        sites = [site for client in self._clients for site in client.sites]
        offers = {site: self._offer(site) for site in sites}
        fetch_s = self._all("fetch", offers)
        push_s = self._all("push", offers)
        started = time.monotonic()
        self._aggregate({site: reply for client in self._clients for site, reply in client.replies.items()})
        aggregate_s = time.monotonic() - started
        self.transport.close_round(1)
        return {
            "fetch_s": fetch_s,
            "push_s": push_s,
            "aggregate_s": aggregate_s,
            "round_s": fetch_s + push_s + aggregate_s,
        }

    def _offer(self, site: str) -> Envelope:
        return self.transport.offer(round_=1, site=site, state_id=STATE, max_update_bytes=MAX_UPDATE_BYTES)

    def _all(self, what: str, offers: Mapping[str, Envelope]) -> float:
        for client in self._clients:
            client.start(what, offers)
        spans = [client.finish() for client in self._clients]
        return max(end for _, end in spans) - min(start for start, _ in spans)

    def _aggregate(self, replies: Mapping[str, Envelope]) -> None:
        aggregation = self._aggregator.start(self.layout, self._origin)
        for site in sorted(replies):
            path = self.transport.receive(round_=1, site=site, reply=replies[site])
            with open_update(path, self.layout) as payload:
                payload.verify()
                aggregation.fold(payload, Contribution(site, 1.0, {}))
            path.unlink()
        aggregation.finish()


class _Client:
    """A process that stands for sites."""

    def __init__(self, folder: Path, megabytes: int, sites: list[str], uplink: str) -> None:
        self.sites, self.replies = sites, dict[str, Envelope]()
        self._connection, theirs = _processes.Pipe()
        self._process = _processes.Process(target=_work, args=(theirs, folder, megabytes, sites, uplink), daemon=True)
        self._process.start()
        assert self._connection.recv() == "ready"

    def start(self, what: str, offers: Mapping[str, Envelope]) -> None:
        self._connection.send((what, {site: dict(offers[site].fields) for site in self.sites}))

    def finish(self) -> tuple[float, float]:
        span, replies = self._connection.recv()
        self.replies = {site: Envelope(fields) for site, fields in replies.items()}
        return span

    def close(self) -> None:
        if self._process.is_alive():
            self._connection.send(None)
        self._process.join()


def _work(connection: Connection, folder: Path, megabytes: int, sites: list[str], uplink: str) -> None:
    folder.mkdir()
    update = encode(folder / "update", layout_of(megabytes), kind="update", pipeline=uplink, seed=1)
    transport = StreamClientTransport(partial(UpdateClient, insecure=True))
    connection.send("ready")
    with ThreadPoolExecutor(len(sites)) as pool:
        while (order := connection.recv()) is not None:
            what, fields = order
            started = time.monotonic()
            moving = {
                site: pool.submit(_move, what, transport, Envelope(fields[site]), folder / site, update)
                for site in sites
            }
            replies: dict[str, dict[str, Any]] = {site: done.result() for site, done in moving.items()}
            ended = time.monotonic()
            for site in sites:
                (folder / site).unlink(missing_ok=True)
            connection.send(((started, ended), replies))


def _move(
    what: str, transport: StreamClientTransport, offer: Envelope, destination: Path, update: Path
) -> dict[str, Any]:
    if what == "fetch":
        transport.fetch(offer, destination)
        return {}
    return dict(transport.push(offer, update).fields)


@contextmanager
def federation(
    folder: Path, megabytes: int, num_clients: int, num_processes: int, *, downlink: str, uplink: str
) -> Iterator[Federation]:
    """Yield a federation (see :class:`Federation`) and end it."""
    made = Federation(folder, megabytes, num_clients, num_processes, downlink=downlink, uplink=uplink)
    try:
        yield made
    finally:
        made.close()
