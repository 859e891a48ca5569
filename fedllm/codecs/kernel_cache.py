"""Where numba keeps the machine code of our kernels: by what their source says, not by where it lies.

Flower installs every version of an app in a folder of its own, below every ``FLWR_HOME``, and numba's own caches go by the
path, so each would compile all kernels again (5 to 8 s of a core at a site, measured). Numba's index holds the
processor's name and features besides, so a home folder that several machines share is safe.
"""

from __future__ import annotations

import functools
import hashlib
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import UserProvidedCacheLocator

from fedllm.home import default_cache_dir

OURS = Path(__file__).resolve().parent


class KernelLocator(UserProvidedCacheLocator):
    """Finds the folder of a kernel of ours and leaves all other functions to numba's own locators."""

    def __init__(self, function: Any, file: str) -> None:
        self._py_file = file
        self._lineno = function.__code__.co_firstlineno
        config: Any = numba.config
        root = Path(config.CACHE_DIR) if config.CACHE_DIR else _own_root()
        self._cache_path = str(root / f"codecs-{source_digest()[:20]}")

    @classmethod
    def from_function(cls, function: Any, file: str) -> Any:
        """Return a locator for a function in this package, None for any other and where nothing can be written."""
        if Path(file).resolve().parent != OURS:
            return None
        locator: Any = cls(function, file)
        try:
            locator.ensure_cache_path()
        except OSError:
            return None
        return locator


@functools.cache
def source_digest() -> str:
    """Return the SHA-256 of this package's sources: all of them, since kernels take constants from each other's modules."""
    digest = hashlib.sha256()
    for path in sorted(OURS.glob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


@functools.cache
def _own_root() -> Path:
    """Return the folder for all kernels of this process: a new one would be another for each."""
    return private_cache_dir()


def private_cache_dir() -> Path:
    """Return the folder that keeps machine code: in the cache, else in the temporary directory, else a new one.

    Machine code that somebody else could have planted is never loaded: the folder belongs to this user, who alone can
    write it.
    """
    places = (default_cache_dir() / "kernels", Path(tempfile.gettempdir()) / f"fedllm-kernels-{os.getuid()}")
    for folder in places:
        if _is_private(folder):
            return folder
    return Path(tempfile.mkdtemp(prefix="fedllm-kernels-"))


def _is_private(folder: Path) -> bool:
    """Make a folder where it is missing, and tell whether this user can write it and nobody else."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = folder.lstat()
    except OSError:
        return False
    is_own = stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid() and not info.st_mode & 0o022
    return is_own and os.access(folder, os.W_OK)
