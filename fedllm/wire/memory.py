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
    """Let the allocator keep up to 16 MiB of freed memory in each heap, and say whether it will.

    By default glibc gives a buffer of the size of a chunk back to the system as soon as it is freed, and the system clears
    its pages anew for the next chunk: a third of the work of sending a file, a tenth of receiving it. The setting holds for
    the whole process. At a site, too: 16 MiB are little beside a model, and glibc itself raises both bounds as far when
    larger buffers are freed.
    """
    library = _glibc()
    return library is not None and all(
        library.mallopt(name, KEPT_BYTES) for name in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD)
    )


@functools.cache
def share_heaps() -> bool:
    """Let all threads allocate from few heaps, and say whether they will.

    By default glibc makes a heap for almost every thread, and what 32 streams leave in pieces over all of them, 2 MB a
    stream, cannot be given back. Threads wait for each other's heap instead, so this is for the server's process, and not
    for a site's, where threads compute.
    """
    library = _glibc()
    return library is not None and bool(library.mallopt(_M_ARENA_MAX, MAX_ARENAS))


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
