"""Logging, set up once per process: one format for our own loggers, whoever configured the root.

``FEDLLM_LOG_FORMAT=json`` writes one object a line, for machines that collect logs::

    {"time": "2026-11-21T18:55:02.113+00:00", "level": "info", "logger": "server_app.story", "run": "demo", "round": 3,
     "node": "server", "event": "round", "message": "..."}

``run``, ``round`` and ``node`` say what the process was about (:func:`about`), ``event`` what kind of thing happened: the
kind of a recorded event, else ``log``. ``error`` holds the trace of an exception. There are no other keys: what a log call
has beside its message is not written, so nothing is written that nobody meant to say.

Evolution: keys are only added.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Literal

LogFormat = Literal["text", "json"]

PACKAGES = ("fedllm", "strategies", "server_app", "client_app")
LEVEL_VARIABLE = "FEDLLM_LOG_LEVEL"
FORMAT_VARIABLE = "FEDLLM_LOG_FORMAT"

_TEXT = "%(levelname)-7s %(message)s"

_about: Mapping[str, object] = MappingProxyType({})


def set_up_logging() -> None:
    """Send our loggers to standard error in one format; safe to call often.

    The level is ``FEDLLM_LOG_LEVEL``, else INFO; the format ``FEDLLM_LOG_FORMAT``, ``text`` or ``json``, else text. Other
    packages' loggers are left as they are.
    """
    level = os.environ.get(LEVEL_VARIABLE, "INFO").upper()
    for package in PACKAGES:
        logger = logging.getLogger(package)
        logger.setLevel(level)
        logger.propagate = False
        if not logger.handlers:
            handler = logging.StreamHandler(sys.stderr)
            handler.setFormatter(JsonLines() if wants_json() else TextLines(_TEXT))
            logger.addHandler(handler)


def wants_json(wanted: LogFormat = "text") -> bool:
    """Say whether logs are to be JSON: because a setting says so, or the environment does."""
    return "json" in (wanted, os.environ.get(FORMAT_VARIABLE, "").lower())


@contextmanager
def about(**what: object) -> Iterator[None]:
    """Say what is logged meanwhile is about: ``run``, ``round``, ``node``. It holds for all threads of the process.

    A process works for one run, and on one thing at a time; what was said before holds again afterwards.
    """
    global _about
    before = _about
    _about = MappingProxyType({**before, **what})
    try:
        yield
    finally:
        _about = before


class TextLines(logging.Formatter):
    """Puts the prefix before every line of a message that has several."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines of a record."""
        lines = record.getMessage().split("\n")
        if len(lines) == 1:
            return super().format(record)
        parts = [logging.makeLogRecord({**record.__dict__, "msg": line, "args": ()}) for line in lines]
        for part in parts[:-1]:
            part.exc_info, part.exc_text, part.stack_info = None, None, None
        return "\n".join(super(TextLines, self).format(part) for part in parts)


class JsonLines(logging.Formatter):
    """Makes one object of a record, in one line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as JSON."""
        error = self.formatException(record.exc_info) if record.exc_info else None
        return json_line(
            record.getMessage(),
            time=record.created,
            level=record.levelname,
            event=getattr(record, "event", "log"),
            logger=record.name,
            about={**_about, **getattr(record, "about", {})},
            error=error,
        )


def json_line(
    message: str,
    *,
    time: float,
    level: str,
    event: str,
    logger: str,
    about: Mapping[str, object],
    error: str | None = None,
) -> str:
    """Return one object of the log, without a line feed.

    Args:
        message: What a person reads.
        time: Seconds since 1970.
        level: The level's name.
        event: Kind of what happened.
        logger: Who says it.
        about: Values of ``run``, ``round``, ``node``, as far as they are known; others are not written.
        error: An exception's trace.
    """
    line = {
        "time": datetime.fromtimestamp(time, UTC).isoformat(timespec="milliseconds"),
        "level": level.lower(),
        "logger": logger,
        **{key: about.get(key) for key in ("run", "round", "node")},
        "event": event,
        "message": message,
    }
    return json.dumps(line | ({"error": error} if error else {}))  # ASCII: one line for every reader, in any locale
