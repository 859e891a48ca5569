"""Ports for servers that a test starts a moment later."""

from __future__ import annotations

import random
import socket

PORTS = range(20_000, 32_000)
"""Below those that the system gives to outgoing connections, of which one could be in use by the time the server starts."""

_draw = random.SystemRandom()


def free_port() -> int:
    """Return a port of the loopback that nobody uses."""
    while True:
        port = _draw.choice(PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def free_ports(number: int) -> list[int]:
    """Return so many different ports."""
    ports: set[int] = set()
    while len(ports) < number:
        ports.add(free_port())
    return list(ports)
