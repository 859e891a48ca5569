"""The server of one federation, in a process of its own, so that its memory is the server's alone.

Messages to sites go over an inherited pipe to the process that has the base loaded, and their replies come back over it;
updates and states travel by the run's own transport.
"""

from __future__ import annotations

import sys
from functools import partial
from multiprocessing.connection import Connection

from flwr.app import Message

from fedllm.config import read_run_config
from server_app.app import open_run, run_federation
from tests.fake_federation import InProcessGrid


def serve(line: Connection) -> None:
    """Run the federation that is asked for, and hand back the most memory that the process held."""
    settings, nodes = line.recv()
    grid = InProcessGrid({node: partial(_ask, line, node) for node in nodes})
    folder, config, state = open_run(read_run_config(settings))
    run_federation(grid, folder, config, state, run_id=1, fixed_sites=True)
    line.send(peak_rss_bytes())


def peak_rss_bytes() -> int:
    """Return the most memory that this program held; `ru_maxrss` would count that of the process which started it."""
    with open("/proc/self/status", encoding="ascii") as status:
        [kilobytes] = [line.split()[1] for line in status if line.startswith("VmHWM:")]
    return int(kilobytes) * 1024


def _ask(line: Connection, node: int, message: Message) -> Message:
    line.send((node, message))
    reply: Message = line.recv()
    return reply


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
