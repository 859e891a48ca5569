"""The system's complaints about files, in our words."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from fedllm.errors import TransportError, explain


@contextlib.contextmanager
def clear_disk_errors(path: Path) -> Iterator[None]:
    """Turn the system's complaints about a file into a TransportError whose cause is the complaint."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        problem = "the disk is full" if full else "a file cannot be read or written"
        fix = "Free disk space." if full else "Check the folder's owner and permissions."
        raise TransportError(explain(problem, found=error.strerror, where=path, fix=fix)) from error
