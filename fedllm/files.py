"""Files that are either old or new, never half-written, and locks between processes."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def atomic_write(path: Path, content: bytes | str, *, durable: bool = True, mode: int = 0o666) -> None:
    """Replace a file's content so that a crash at any moment leaves the old content or the new one.

    The content goes to a temporary file in the same folder, reaches the disk if it is to be durable, and takes the name;
    then the folder's own entry reaches the disk.

    Args:
        path: The file; its folder exists.
        content: Bytes, or text that is written as UTF-8.
        durable: Also against a power cut, not only against the death of the process; costs milliseconds.
        mode: Permissions of the file before the umask; 0o600 for a secret, which then is nobody else's at any moment.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, waiting for whoever holds it; the system lets go when a process ends, however it ends.

    Args:
        path: The lock file, made where there is none, readable by its owner alone; its folder exists.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries (names created, renamed, removed) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
