"""What the phases of a run share: see :mod:`server_app.loop` for their course."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedllm.config import RunConfig, flatten
from fedllm.runs import RunFolder
from fedllm.wire.transport import ServerTransport
from server_app.broadcast import Broadcaster
from server_app.exchange import Exchange
from server_app.recorder import Recorder
from server_app.roster import Roster
from strategies.slots import Strategy


@dataclass(frozen=True)
class Federation:
    """What the phases of a run share.

    Attributes:
        config: The effective run config.
        folder: The run's folder.
        recorder: Metrics, TensorBoard and story.
        exchange: The way to the sites.
        roster: Who takes part.
        strategy: The four slots.
        transport: How payloads travel.
        broadcaster: Which states travel.
    """

    config: RunConfig
    folder: RunFolder
    recorder: Recorder
    exchange: Exchange
    roster: Roster
    strategy: Strategy
    transport: ServerTransport
    broadcaster: Broadcaster

    @property
    def instruction(self) -> dict[str, object]:
        """Fields that every instruction has."""
        return {"run": self.folder.name, "run_folder": str(self.folder.path), "config": flatten(self.config)}

    @property
    def home(self) -> Path:
        """Folder that holds ``runs/``; relative paths start there."""
        return self.folder.path.parent.parent


class Stopwatch:
    """Seconds by phase, in the order in which the phases ran."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time one phase; the same name adds up."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - start

    @property
    def seconds(self) -> float:
        """Seconds since the stopwatch was made."""
        return time.perf_counter() - self._start
