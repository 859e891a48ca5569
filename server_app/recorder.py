"""Writes down what happens in a run: events to ``metrics.jsonl``, scalars to TensorBoard, the story to the log.

``metrics.jsonl`` is the record; the TensorBoard file is derived from it and made anew when a run is resumed. The log goes
to ``log.txt`` too for as long as the recorder is open.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Protocol

from fedllm.errors import CheckpointError, explain
from fedllm.files import atomic_write
from fedllm.runs import Event, Manifest, RunFolder, read_metrics
from server_app.events import AnyEvent, parse_event, read_events
from server_app.logfile import LogFile
from server_app.results import Results
from server_app.story import Story
from server_app.tensorboard import ScalarWriter, scalars_of

log = logging.getLogger(__name__)

_AFTER_LAST_ROUND = ("local_only", "personalised", "answer", "end")


class Listener(Protocol):
    """Hears what is recorded, such as what shows a run's figures while it lives."""

    def begin(self, events: Sequence[AnyEvent]) -> None:
        """Take note of everything that is recorded so far; called at first and whenever events were forgotten."""

    def hear(self, event: AnyEvent) -> None:
        """Take note of one event more."""


class Recorder:
    """The one writer of a run's metrics; to be closed, or used in a ``with`` statement.

    A folder that has metrics is gone on with; a last line that a crash cut is removed.

    Args:
        folder: The run's folder, held by this process.
        listeners: Who else is told.

    Attributes:
        events: What is in ``metrics.jsonl``, in order.

    Raises:
        CheckpointError: The metrics that are there cannot be read, or the folder cannot be written.
    """

    events: list[Event]
    _scalars: ScalarWriter | None

    def __init__(self, folder: RunFolder, listeners: Sequence[Listener] = ()) -> None:
        self._folder, self._listeners = folder, listeners
        self._story = Story(folder.path, _num_rounds(folder))
        self._open(read_metrics(folder.metrics))
        self._log_file = LogFile(folder.log)

    def record(self, event: Mapping[str, object]) -> None:
        """Append one event, mirror its scalars, and tell it.

        Args:
            event: Its kind under ``event`` and the keys of the class of that kind in :mod:`server_app.events`; further
                keys are kept. ``time`` is filled in.

        Raises:
            pydantic.ValidationError: The event is not what its kind should be (a programmer's error).
            CheckpointError: The disk refuses.
        """
        parsed = parse_event({"time": time.time(), **event})
        raw: Event = json.loads(parsed.model_dump_json())
        try:
            self._file.write(_line(raw))
            self._file.flush()
            self._mirror(parsed)
        except OSError as error:
            raise self._refused(error) from error
        self._story.tell(parsed, Results.of(self._parsed))
        self.events.append(raw)
        self._parsed.append(parsed)
        for listener in self._listeners:
            listener.hear(parsed)

    def sync(self) -> None:
        """Bring what was recorded to the disk, as is due before a checkpoint that relies on it.

        Raises:
            CheckpointError: The disk refuses.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._refused(error) from error

    def rewind(self, round_: int) -> None:
        """Forget what happened after a round, so that the run can go on from that round's checkpoint.

        Everything goes from the first event of a later round or of the run's end onward.
        """
        late = (number for number, event in enumerate(self.events) if _is_after(event, round_))
        kept = self.events[: next(late, len(self.events))]
        log.debug("forgot %d events after round %d", len(self.events) - len(kept), round_)
        self._release()
        self._open(kept)

    def close(self) -> None:
        """Bring everything to the disk and close the files."""
        if self._file.closed:
            return
        try:
            self.sync()
        finally:
            self._release()
            self._log_file.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, events: list[Event]) -> None:
        """Make the files hold exactly these events, and be ready for more."""
        content, path = b"".join(map(_line, events)), self._folder.metrics
        try:
            if not path.exists() or path.read_bytes() != content:
                atomic_write(path, content)
            self.events, self._parsed = events, read_events(path)
            shutil.rmtree(self._folder.tensorboard, ignore_errors=True)
            self._scalars = None
            for event in self._parsed:
                self._mirror(event)
            self._file = path.open("ab")
        except OSError as error:
            raise self._refused(error) from error
        for listener in self._listeners:
            listener.begin(self._parsed)

    def _mirror(self, event: AnyEvent) -> None:
        scalars = scalars_of(event)
        if scalars is None:
            return
        if self._scalars is None:
            self._scalars = ScalarWriter(self._folder.tensorboard, event.time)
        self._scalars.add(scalars[1], step=scalars[0], wall_time=event.time)

    def _release(self) -> None:
        self._file.close()
        if self._scalars:
            self._scalars.close()

    def _refused(self, error: OSError) -> CheckpointError:
        fix = "Free space or fix permissions, then resume the run."
        return CheckpointError(
            explain("a run's metrics cannot be written", found=error, where=self._folder.path, fix=fix)
        )


def _line(event: Event) -> bytes:
    return json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _is_after(event: Event, round_: int) -> bool:
    return event["event"] in _AFTER_LAST_ROUND or event.get("round", 0) > round_


def _num_rounds(folder: RunFolder) -> int | None:
    """Return the number of rounds that the run is to have, None where no manifest says so."""
    if not folder.manifest.exists():
        return None
    return int(Manifest.read(folder.manifest).config.get("num_rounds", 0)) or None
