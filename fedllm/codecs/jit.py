"""Compile a kernel when it is first called, and keep the machine code on disk.

Importing numba takes half a second and compiling a kernel some more, so neither happens before a pipeline needs it.
Kernels release the GIL, and none uses fast-math: equal input gives equal bits on every machine.

Writing kernels: walk blocks as slices (``part = values[low:high]``) and index from 0. An index that numba cannot prove
to be non-negative costs a wrap-around test for every element, which stops vectorization (measured: a factor of 4 to 5).
Numba does not check bounds, so lengths and codes that came from outside are checked before a kernel sees them.
"""

from __future__ import annotations

import functools
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def kernel(function: Callable[P, R]) -> Callable[P, R]:
    """Compile a function of scalars and arrays with numba at its first call."""
    compiled: list[Callable[P, R]] = []

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not compiled:
            compiled.append(_compile(function))
        return compiled[0](*args, **kwargs)

    return call


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    import numba  # here because it takes half a second, which `fedllm --help` should not pay

    config: Any = numba.config
    if not config.CACHE_DIR and not (_is_writable(os.path.dirname(__file__)) or _is_writable(os.path.expanduser("~"))):
        config.CACHE_DIR = str(private_cache_dir())
    compiled: Callable[..., Any] = numba.njit(function, nogil=True, cache=True)
    return compiled


def _is_writable(folder: str) -> bool:
    return os.access(folder, os.W_OK)


def private_cache_dir() -> Path:
    """Return a folder in the temporary directory that only this user can write, for read-only installations.

    Numba's cache holds machine code, so a folder of that name that belongs to someone else is not used.
    """
    folder = Path(tempfile.gettempdir()) / f"fedllm-numba-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    info = folder.lstat()
    is_private = stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid() and not info.st_mode & 0o022
    return folder if is_private else Path(tempfile.mkdtemp(prefix="fedllm-numba-"))
