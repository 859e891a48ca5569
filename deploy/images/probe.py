"""Health check of a container: somebody answers on this port, or at this address.

Usage: probe.py PORT | probe.py https://HOST:PORT/PATH CA_FILE
"""

from __future__ import annotations

import socket
import ssl
import sys
from urllib.request import urlopen

TIMEOUT_S = 5.0


def main(target: str, authority: str | None = None) -> None:
    """Raise unless somebody answers; an address must answer with status 200."""
    if target.isdigit():
        socket.create_connection(("127.0.0.1", int(target)), TIMEOUT_S).close()
        return
    with urlopen(target, timeout=TIMEOUT_S, context=ssl.create_default_context(cafile=authority)) as answer:
        assert answer.status == 200, answer.status


if __name__ == "__main__":
    main(*sys.argv[1:])
