"""The run's own copy of the server's log, ``log.txt``: what the operator saw, kept with the results."""

from __future__ import annotations

import logging
from pathlib import Path

from fedllm.logs import PACKAGES, TextLines


class LogFile:
    """Copies what our loggers say into a file, appending, until it is closed.

    Args:
        path: The file; made with the first line.
    """

    def __init__(self, path: Path) -> None:
        self._handler = logging.FileHandler(path, encoding="utf-8", delay=True)
        self._handler.setFormatter(TextLines("%(asctime)s %(levelname)-7s %(message)s"))
        for package in PACKAGES:
            logging.getLogger(package).addHandler(self._handler)

    def close(self) -> None:
        """Stop copying and close the file."""
        for package in PACKAGES:
            logging.getLogger(package).removeHandler(self._handler)
        self._handler.close()
