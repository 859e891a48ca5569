"""Ports for servers that a test starts a moment later."""

from __future__ import annotations

import random
from itertools import islice

from fedllm import ports

FIRST, LAST = 20_000, 32_000
"""Below those that the system gives to outgoing connections, of which one could be in use by the time the server starts."""

_draw = random.SystemRandom()


def free_port() -> int:
    """Return a port of the loopback that nobody uses."""
    return free_ports(1)[0]


def free_ports(number: int) -> list[int]:
    """Return so many different ports."""
    after = _draw.randrange(FIRST, LAST - 1000)
    return list(islice(ports.free_ports("127.0.0.1", range(after, LAST)), number))
