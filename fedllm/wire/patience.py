"""How long a client goes on: deadlines, pauses between attempts, and a watch over a call that hangs."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Protocol

from fedllm.errors import CancelledError, CorruptPayloadError, FedLLMError, TransportError, explain

FIRST_PAUSE_S = 0.25
MAX_PAUSE_S = 20.0
POLL_S = 0.1
MAX_CORRUPT = 4
"""Times that a chunk may arrive with a wrong checksum and be asked for again; then it is wrong where it comes from."""

_jitter = random.SystemRandom()
"""Not derived from the run's seed: no result depends on it, and equal pauses everywhere are what it has to prevent."""


class Patience:
    """Time left for one transfer, over all its attempts.

    Args:
        deadline_s: Seconds for the whole transfer.
        quiet_s: Seconds of failing without a byte of progress after which it is given up.
        should_stop: Asked often, from other threads too; true ends the transfer with CancelledError.
    """

    def __init__(self, deadline_s: float, quiet_s: float, should_stop: Callable[[], bool]) -> None:
        self._ends_at = time.monotonic() + deadline_s
        self._deadline_s, self._quiet_s = deadline_s, quiet_s
        self._pause_s = FIRST_PAUSE_S
        self._failing_since: float | None = None
        self._num_corrupt = 0
        self.should_stop = should_stop

    @property
    def remaining_s(self) -> float:
        """Seconds until the deadline, never negative."""
        return max(0.0, self._ends_at - time.monotonic())

    def progressed(self) -> None:
        """Note that bytes have moved: failures are counted afresh."""
        self._failing_since, self._num_corrupt = None, 0
        self._pause_s = FIRST_PAUSE_S

    def pause(self, error: FedLLMError) -> None:
        """Wait before the next attempt: exponentially longer, with full jitter.

        Args:
            error: What the last attempt failed with; raised if there is no time for another, or none is of use.

        Raises:
            FedLLMError: The error, when the deadline or the time without progress is over, or bytes were corrupt too often.
            CancelledError: The caller wants to stop.
        """
        self._num_corrupt += isinstance(error, CorruptPayloadError)
        if self._num_corrupt > MAX_CORRUPT:
            raise error
        pause_s = _jitter.uniform(0.2, 1.0) * self._pause_s
        self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)
        self._failing_since = self._failing_since or time.monotonic()
        wakes_at = time.monotonic() + pause_s
        if wakes_at > min(self._ends_at, self._failing_since + self._quiet_s):
            limit = f"{self._deadline_s:g} s in all, {self._quiet_s:g} s without progress"
            raise TransportError(explain("gave up after repeated failures", expected=limit, found=error)) from error
        while (left := wakes_at - time.monotonic()) > 0:
            self.check()
            time.sleep(min(left, POLL_S))

    def check(self) -> None:
        """Raise CancelledError if the caller wants to stop."""
        if self.should_stop():
            raise CancelledError(explain("a transfer was stopped", fix="The payload is still on disk."))


class Cancellable(Protocol):
    """A call under way."""

    def cancel(self) -> object:
        """End it; the one who waits for it gets an error."""


class Watch:
    """Cancels a call that the caller no longer wants, or in which nothing moves. A context manager around the call.

    Args:
        call: The call.
        stall_s: Seconds without a chunk after which it is cancelled.
        patience: Knows whether the caller wants to stop.
    """

    def __init__(self, call: Cancellable, stall_s: float, patience: Patience) -> None:
        self._call, self._stall_s, self._patience = call, stall_s, patience
        self._moved_at = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="update-watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._call.cancel()

    def moved(self) -> None:
        """Note that a chunk has moved."""
        self._moved_at = time.monotonic()

    def _look(self) -> None:
        while not self._over.wait(POLL_S):
            if self._patience.should_stop() or time.monotonic() - self._moved_at > self._stall_s:
                self._call.cancel()
                return
