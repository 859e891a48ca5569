"""A progress bar for long local work: one that moves on a terminal, a line now and then in a log."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from tqdm import tqdm

log = logging.getLogger(__name__)

LINE_EVERY_S = 5.0
"""Seconds between two lines where nobody looks at a terminal, as under ``flwr run --stream``."""

_WIDTH = 20


class Progress:
    """Shows how far one piece of work is.

    Args:
        title: What is under way, for example ``site-2 round 1``.
        total: Steps in all.
    """

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done = title, total, 0
        self._start = self._shown = time.monotonic()
        self._bar = tqdm(total=total, desc=title, unit="step", leave=False) if sys.stderr.isatty() else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def step(self, note: str) -> None:
        """Count one step and say how it went, for example ``loss 2.41``."""
        self._done += 1
        if self._bar is not None:
            self._bar.set_postfix_str(note)
            self._bar.update()
            return
        now = time.monotonic()
        if now - self._shown >= LINE_EVERY_S or self._done == self._total:
            self._shown = now
            log.info("%s", self._line(note, now - self._start))

    def _line(self, note: str, seconds: float) -> str:
        filled = round(_WIDTH * self._done / self._total)
        bar = "█" * filled + "░" * (_WIDTH - filled)
        return f"{self._title} {bar} {self._done}/{self._total}  {note}  {seconds / self._done:.1f} s/step"
