"""Where to listen for those who ask for figures."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fedllm.errors import ConfigError, explain
from fedllm.ports import parse_ports

_ADDRESS = re.compile(r"(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<host>[^\s:\[\]]+)):(?P<ports>[0-9-]+)")


@dataclass(frozen=True)
class Address:
    """Where to listen.

    Attributes:
        host: Name or address of an interface.
        ports: Ports of which the first free one is taken.
    """

    host: str
    ports: range

    @staticmethod
    def parse(text: str) -> Address:
        """Read ``127.0.0.1:9300``, ``0.0.0.0:9300-9309`` or ``[::1]:9300``.

        Raises:
            ConfigError: It is no address.
        """
        match = _ADDRESS.fullmatch(text.strip())
        if match is None:
            expected = "host:port or host:first-last, such as 127.0.0.1:9300"
            raise ConfigError(explain("the address for metrics cannot be read", expected=expected, found=repr(text)))
        return Address(match["six"] or match["host"], parse_ports(match["ports"]))
