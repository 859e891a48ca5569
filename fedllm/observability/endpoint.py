"""Shows a board to Prometheus: as text, and over HTTP while a process lives.

The only file that imports prometheus_client. Whoever reaches the port can read the figures and do nothing else: a request
names nothing and changes nothing. There is no encryption and no password, so the address should be the loopback's or a
closed network's.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterator
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from fedllm.observability.address import Address
from fedllm.observability.board import Board, Family
from fedllm.ports import free_ports

log = logging.getLogger(__name__)

REQUEST_S = 10.0
"""Seconds after which a connection that says nothing is closed."""


class Endpoint:
    """Answers Prometheus until it is closed.

    Args:
        address: Where to listen.
        board: Called for every request; returns the board as it is at that moment.
        constant: Labels that every figure gets.

    Raises:
        OSError: None of the ports is free, or the host is not of this machine.
    """

    def __init__(self, address: Address, board: Callable[[], Board], constant: dict[str, str] | None = None) -> None:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Shown(board, constant or {}))
        ProcessCollector(registry=registry)
        self._app = make_wsgi_app(registry)
        self._server = _listening(address, self._answer)
        self._scraped = threading.Event()
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Where it is read."""
        host, port = self._server.server_address[:2]
        return f"http://{f'[{host!s}]' if ':' in str(host) else str(host)}:{port}/metrics"

    def wait_for_request(self, timeout_s: float) -> bool:
        """Wait until somebody asks anew, and say whether somebody did."""
        self._scraped.clear()
        return self._scraped.wait(timeout_s)

    def close(self) -> None:
        """Finish what is being answered and stop."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, environment: dict[str, Any], start: Callable[..., Any]) -> Any:
        answer = self._app(environment, start)
        self._scraped.set()
        return answer


def as_text(board: Board, constant: dict[str, str] | None = None) -> str:
    """Return a board in Prometheus' text format, as a node exporter reads it from files."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Shown(lambda: board, constant or {}))
    return generate_latest(registry).decode()


class _Shown(Collector):
    """A board as prometheus_client wants it."""

    def __init__(self, board: Callable[[], Board], constant: dict[str, str]) -> None:
        self._board, self._constant = board, constant

    def collect(self) -> Iterator[Metric]:
        board = self._board()
        for family in board.families.values():
            if metric := _metric(board, family, self._constant):
                yield metric

    def describe(self) -> list[Metric]:
        return []


def _metric(board: Board, family: Family, constant: dict[str, str]) -> Metric | None:
    metric = _KINDS[family.kind](family.name, family.help, labels=[*constant, *family.labels])
    figures = list(board.figures(family.name))
    for figure in figures:
        labels = [*constant.values(), *figure.labels]
        if isinstance(metric, SummaryMetricFamily):
            metric.add_metric(labels, count_value=figure.count, sum_value=figure.value)
        else:
            metric.add_metric(labels, figure.value)
    return metric if figures else None


_KINDS: dict[str, type[CounterMetricFamily | GaugeMetricFamily | SummaryMetricFamily]] = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "summary": SummaryMetricFamily,
}


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = False  # closing waits for answers under way, so that the last figures arrive

    def server_bind(self) -> None:
        """Bind without asking a name server for this machine's name, as the standard library would."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = "fedllm", self.server_address[1]
        self.setup_environ()


class _SixServer(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = REQUEST_S

    def log_message(self, format: str, *arguments: object) -> None:
        log.debug(format, *arguments)


def _listening(address: Address, app: Callable[..., Any]) -> WSGIServer:
    kind = _SixServer if ":" in address.host else _Server
    problem: OSError | None = None
    for port in free_ports(address.host, address.ports):
        try:
            return make_server(address.host, port, app, server_class=kind, handler_class=_Handler)
        except OSError as error:
            problem = error
    raise problem or OSError(f"no free port of {address.host}:{address.ports.start}-{address.ports.stop - 1}")
