"""The C library's memory allocator in a process that moves many buffers of a megabyte."""

from __future__ import annotations

import ctypes
import functools
import logging

logger = logging.getLogger(__name__)

KEPT_BYTES = 16 << 20

MAX_ARENAS = 2

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


@functools.cache
def keep_freed_buffers() -> bool:
    """Let the allocator keep up to 16 MiB of freed memory in few heaps, and say whether it will.

    By default glibc gives a buffer of the size of a chunk back to the system as soon as it is freed, and the system clears
    its pages anew for the next chunk: a third of the work of sending a file. It also makes a heap for almost every thread,
    and what 32 streams leave in pieces over all of them, 2 MB a stream, cannot be given back. The setting holds for the
    whole process, so it is for the server's and not for a site's, where transfers are rare and the memory belongs to
    training.
    """
    library = _glibc()
    if library is None:
        return False
    settings = {_M_MMAP_THRESHOLD: KEPT_BYTES, _M_TRIM_THRESHOLD: KEPT_BYTES, _M_ARENA_MAX: MAX_ARENAS}
    accepted: list[int] = [library.mallopt(name, value) for name, value in settings.items()]
    return all(accepted)


def return_freed_buffers() -> bool:
    """Give freed memory back to the system, and say whether there was any.

    What many streams used at one time would otherwise stay with the process, and the aggregate's sums come on top of it.
    """
    library = _glibc()
    return library is not None and bool(library.malloc_trim(0))


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
        library.mallopt, library.malloc_trim  # noqa: B018
    except (OSError, AttributeError):
        logger.debug("this is another C library; its allocator is left as it is")
        return None
    return library
