"""A run's folder: what is in it, and how to make, find and read it.

::

    <home>/runs/<name>/
        manifest.json     what the run is: config, versions, base fingerprint, sites' counts; no data content
        metrics.jsonl     what happened, one event a line, appended
        tensorboard/      the same numbers as TensorBoard events
        adapter/          final global adapter in PEFT's format
        best/             global adapter of the round with the lowest held-out loss
        adapter-group-1/  the same of the further groups of sites, where there are several (and best-group-1/)
        checkpoints/      what a resumed run starts from
        report.html       the result for people, rebuilt from the files above
        log.txt           the server's log
        lock              held by the process that writes the folder

Evolution: later releases add files, keys and events; they do not change the meaning of those that exist. Readers ignore
what they do not know.
"""

from __future__ import annotations

import difflib
import fcntl
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from fedllm.errors import CheckpointError, ConfigError, explain
from fedllm.home import calling_app, resolve_home, shell_home
from fedllm.manifest import Manifest, SiteCounts
from fedllm.provenance import git_revision, versions

__all__ = [
    "Event",
    "Manifest",
    "RunFolder",
    "SiteCounts",
    "calling_app",
    "git_revision",
    "list_runs",
    "read_metrics",
    "resolve_home",
    "shell_home",
    "versions",
]

Event = dict[str, Any]
"""One line of ``metrics.jsonl``; ``event`` says its kind, ``time`` is seconds since 1970."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True)
class RunFolder:
    """The places in a run's folder. Making one touches nothing; see :meth:`create` and :meth:`open`."""

    path: Path

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    @property
    def manifest(self) -> Path:
        """What the run is: see :class:`Manifest`."""
        return self.path / "manifest.json"

    @property
    def metrics(self) -> Path:
        """What happened: see :func:`read_metrics`."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard events."""
        return self.path / "tensorboard"

    @property
    def adapter(self) -> Path:
        """Folder of the final global adapter in PEFT's format."""
        return self.path / "adapter"

    @property
    def best(self) -> Path:
        """Folder of the best round's global adapter in PEFT's format."""
        return self.path / "best"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        """The report for people."""
        return self.path / "report.html"

    @property
    def log(self) -> Path:
        """The server's log."""
        return self.path / "log.txt"

    @property
    def lock(self) -> Path:
        """Locked by the process that writes the folder, see :meth:`held`."""
        return self.path / "lock"

    @classmethod
    def create(cls, home: Path, name: str) -> RunFolder:
        """Make a new run's folder with its subfolder of checkpoints.

        Raises:
            ConfigError: The name cannot be a folder's.
            CheckpointError: A run of this name exists, or the folder cannot be made.
        """
        folder = cls(_runs(home) / _checked_name(name))
        try:
            folder.checkpoints.parent.mkdir(parents=True, exist_ok=True)
            occupied = any(folder.path.iterdir())
        except OSError as error:
            fix = "Set `home` to a folder that can be written."
            raise CheckpointError(explain("a run's folder cannot be made", found=error, fix=fix)) from error
        if occupied:
            fix = f'Choose another `name`, or set resume="{name}" to go on with it.'
            raise CheckpointError(explain(f"a run named {name!r} exists already", where=folder.path, fix=fix))
        folder.checkpoints.mkdir()
        return folder

    @classmethod
    def open(cls, home: Path, name: str) -> RunFolder:
        """Return an existing run's folder.

        Raises:
            ConfigError: The name cannot be a folder's.
            CheckpointError: There is no such run.
        """
        folder = cls(_runs(home) / _checked_name(name))
        if not folder.path.is_dir():
            known = [run.name for run in list_runs(home)]
            near = difflib.get_close_matches(name, known, n=1)
            fix = f"Did you mean {near[0]!r}?" if near else "`fedllm runs` lists all runs."
            raise CheckpointError(explain(f"there is no run named {name!r}", where=_runs(home), fix=fix))
        return folder

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder while writing to it; the system lets go when the process ends, however it ends.

        Raises:
            CheckpointError: Another process holds it.
        """
        with self.lock.open("a") as file:
            if not _try_lock(file):
                fix = "Wait until it has ended, or stop it with `flwr stop`."
                raise CheckpointError(explain("another process writes this run", where=self.path, fix=fix))
            yield

    @property
    def is_held(self) -> bool:
        """Whether a process writes the folder now."""
        if not self.lock.exists():
            return False
        with self.lock.open("a") as file:
            return not _try_lock(file)


def list_runs(home: Path) -> list[RunFolder]:
    """Return the runs below a home, oldest first; folders without manifest and metrics are not runs."""
    folders = [RunFolder(path) for path in _runs(home).iterdir()] if _runs(home).is_dir() else []
    runs = [run for run in folders if run.manifest.is_file() or run.metrics.is_file()]
    return sorted(runs, key=lambda run: (_started(run), run.name))


def read_metrics(path: Path) -> list[Event]:
    """Return a run's events in order, none where the file is missing.

    A crash can cut the last line; such a line is left out. Unknown kinds of events are kept.

    Raises:
        CheckpointError: A line before the last is not an event.
    """
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines = text.split("\n")
    events = [_parse(line) for line in lines]
    for number, (line, event) in enumerate(zip(lines[:-1], events[:-1], strict=True), start=1):
        if event is None and line.strip():
            raise CheckpointError(
                explain("a line of metrics is not an event", found=repr(line[:60]), where=f"{path}:{number}")
            )
    return [event for event in events if event is not None]


def _parse(line: str) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


def _runs(home: Path) -> Path:
    return home / "runs"


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        expected = "1 to 100 letters, digits, '_', '-' and '.', not starting with '-' or '.'"
        raise ConfigError(explain("a run's name cannot be used for a folder", expected=expected, found=repr(name)))
    return name


def _started(run: RunFolder) -> float:
    try:
        return datetime.fromisoformat(Manifest.read(run.manifest).created).timestamp()
    except (CheckpointError, ValueError):
        return run.path.stat().st_mtime


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
