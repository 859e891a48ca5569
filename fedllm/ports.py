"""Finding a port to listen on."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterator

from fedllm.errors import ConfigError, explain


def parse_ports(text: str) -> range:
    """Read a port or an inclusive range of ports, such as ``9200-9299``; ``0`` lets the system choose.

    Raises:
        ConfigError: The text is neither.
    """
    match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", text.strip())
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if not first <= last <= 65535 or (first == 0 and last > 0):
        raise ConfigError(explain("ports cannot be read", expected="a range such as 9200-9299", found=repr(text)))
    return range(first, last + 1)


def free_ports(host: str, ports: range) -> Iterator[int]:
    """Yield those ports that nobody listens on; a port may be taken between the look and the use."""
    for port in ports:
        if port == 0 or _is_free(host, port):
            yield port


def _is_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe, contextlib.suppress(OSError):
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        return True
    return False
