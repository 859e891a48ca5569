"""What a running site says about itself, in a file that any process may read.

Evolution: fields are only added, with a default.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from fedllm.files import atomic_write

Phase = Literal["stopped", "starting", "connected", "unreachable", "waiting"]


class Status(BaseModel):
    """The state of a site's service."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    phase: Phase = "stopped"
    """`starting` (not yet admitted by the server), `connected`, `unreachable` (the SuperNode tries again by itself),
    `waiting` (before the next start), or `stopped`."""

    pid: int = 0
    """Process that holds the others."""

    started: str = ""
    """When the service began, ISO 8601 in UTC."""

    node_id: str = ""
    """The id that Flower gave this site, empty before it was admitted."""

    last_message: str = ""
    """Kind of the last message from the server, such as `train`."""

    last_message_at: str = ""
    """When it came, ISO 8601 in UTC."""

    num_restarts: int = 0
    """How often the SuperNode had to be started again."""

    note: str = ""
    """Why it waits, in a clause."""

    @property
    def is_running(self) -> bool:
        """Say whether there is a service at all."""
        return self.phase != "stopped"

    def sentence(self) -> str:
        """Return the status as one line for a person."""
        if not self.is_running:
            return "not running"
        parts = [
            f"running since {_minute(self.started)} (process {self.pid})",
            _PHASES[self.phase].format(self.node_id),
        ]
        parts += [self.note] if self.note else []
        parts += [f"last message: {self.last_message} at {_minute(self.last_message_at)}"] if self.last_message else []
        parts += [f"{self.num_restarts} restarts"] if self.num_restarts else []
        return "; ".join(parts)


_PHASES = {
    "starting": "connecting",
    "connected": "connected as node {}",
    "unreachable": "the server does not answer, trying again",
    "waiting": "waiting before the next start",
}


def now() -> str:
    """Return the time in ISO 8601, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_status(path: Path, status: Status) -> None:
    """Replace the status file."""
    atomic_write(path, status.model_dump_json(), durable=False)


def read_status(path: Path) -> Status:
    """Read the status file; a missing or unreadable one is an unknown start."""
    try:
        return Status.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return Status(phase="starting")


def _minute(moment: str) -> str:
    return datetime.fromisoformat(moment).astimezone().strftime("%Y-%m-%d %H:%M") if moment else "?"
