"""A setting of the C library's memory allocator for processes that move many buffers of a megabyte."""

from __future__ import annotations

import ctypes
import functools
import logging

logger = logging.getLogger(__name__)

KEPT_BYTES = 16 << 20

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@functools.cache
def keep_freed_buffers() -> bool:
    """Let the allocator keep up to 16 MiB of freed memory, and say whether it will.

    By default glibc gives a buffer of the size of a chunk back to the system as soon as it is freed, and the system clears
    its pages anew for the next chunk: a third of the work of sending a file. It holds for the whole process, so it is for
    the server's and not for a site's, where transfers are rare and the memory belongs to training.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        logger.debug("the allocator cannot be set")
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, KEPT_BYTES) and mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES))
