"""Start a program that ends with its parent: ``python tied.py PARENT_PID PROGRAM ARGUMENT...``.

A SuperNode that outlived its service would keep the site's place at the server, and the next service would be refused for
as long as it lives. Only Linux can do this; elsewhere such a SuperNode must be ended by hand.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(parent: int, command: list[str]) -> None:
    """Become the command, to be sent SIGTERM when the parent dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before
            sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
