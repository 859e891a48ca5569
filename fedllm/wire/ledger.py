"""What the update server must not forget when it restarts: openings of rounds and spent tickets.

::

    <folder>/ledger/<round>/attempt              how often the round was opened
    <folder>/ledger/<round>/<ticket id>.spent    an empty file per fetch that was confirmed

Pushes need no entry: the spool's receipts say which are done.
"""

from __future__ import annotations

from pathlib import Path

from fedllm.files import atomic_write
from fedllm.wire.files import clear_disk_errors


class Ledger:
    """Openings and spent tickets of one run, as files.

    Args:
        folder: The spool's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "ledger"

    def open_round(self, round_: int) -> int:
        """Count one more opening of a round, forget its spent tickets, and return the count: its attempt."""
        attempt = self.attempt(round_) + 1
        folder = self._folder / str(round_)
        with clear_disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            atomic_write(folder / "attempt", str(attempt))
            for path in folder.glob("*.spent"):
                path.unlink()
        return attempt

    def attempt(self, round_: int) -> int:
        """Return how often a round was opened."""
        path = self._folder / str(round_) / "attempt"
        with clear_disk_errors(path):
            return int(path.read_text()) if path.exists() else 0

    def spend(self, round_: int, ticket_id: str) -> None:
        """Remember that a ticket has been used up."""
        path = self._spent_path(round_, ticket_id)
        with clear_disk_errors(path):
            path.touch()

    def is_spent(self, round_: int, ticket_id: str) -> bool:
        """Tell whether a ticket has been used up."""
        return self._spent_path(round_, ticket_id).exists()

    def _spent_path(self, round_: int, ticket_id: str) -> Path:
        return self._folder / str(round_) / f"{ticket_id}.spent"
