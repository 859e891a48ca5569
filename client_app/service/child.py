"""One program of the service: started so that it ends with us, its output read line by line."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

PAUSE_S = 2.0
_TIED = Path(__file__).with_name("tied.py")


class Child:
    """A running program and all that it starts.

    Args:
        command: Program and arguments.
        environment: Its environment.
        on_line: Called with every line of its output, in a thread of its own.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], on_line: Callable[[str], None]) -> None:
        tied = [sys.executable, str(_TIED), str(os.getpid()), *command]
        self._process = subprocess.Popen(
            tied,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C at a terminal reaches the service alone, which ends the others in order
        )
        self._reader = threading.Thread(target=self._read, args=(on_line,), daemon=True)
        self._reader.start()

    def _read(self, on_line: Callable[[str], None]) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                on_line(line)

    @property
    def pid(self) -> int:
        """Return its process id."""
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Say whether the program has ended; what it started may still run."""
        return self._process.poll() is not None

    def end(self, grace_s: float) -> None:
        """Ask the program and all below it to end, and end by force what is left after the grace."""
        family = _family(self.pid)
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.terminate()
        _, alive = psutil.wait_procs(family, timeout=grace_s)
        for member in alive:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        self._process.wait()
        self._reader.join(timeout=1.0)


class Companion:
    """A program beside another that is started again whenever it ends.

    Args:
        start: Starts it.
        on_end: Called when it has ended by itself.

    Attributes:
        num_ends: How often it did.
    """

    def __init__(self, start: Callable[[], Child], on_end: Callable[[], None]) -> None:
        self._start, self._on_end = start, on_end
        self._child: Child | None = None
        self._due = 0.0
        self.num_ends = 0

    def tend(self) -> None:
        """Start it where it is not running; after it ended only when a pause is over."""
        if self._child is not None and self._child.has_ended:
            self._child, self._due = None, time.monotonic() + PAUSE_S
            self.num_ends += 1
            self._on_end()
        if self._child is None and time.monotonic() >= self._due:
            self._child = self._start()

    def end(self, grace_s: float) -> None:
        """End it, if it runs."""
        if self._child is not None:
            self._child.end(grace_s)


def _family(pid: int) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        first = psutil.Process(pid)
        return [first, *first.children(recursive=True)]
    return []
