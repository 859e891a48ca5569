"""Compile a kernel when it is first called, and keep the machine code on disk (:mod:`fedllm.codecs.kernel_cache`).

Importing numba takes half a second and compiling a kernel some more, so neither happens before a pipeline needs it.
Kernels release the GIL, and none uses fast-math: equal input gives equal bits on every machine.

Writing kernels: walk blocks as slices (``part = values[low:high]``) and index from 0. An index that numba cannot prove
to be non-negative costs a wrap-around test for every element, which stops vectorization (measured: a factor of 4 to 5).
Numba does not check bounds, so lengths and codes that came from outside are checked before a kernel sees them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

LOCATORS = "fedllm.codecs.kernel_cache.KernelLocator,UserProvidedCacheLocator,InTreeCacheLocator,UserWideCacheLocator"
"""How numba finds where machine code is kept: of our kernels, and as ever of others."""

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
    config.CACHE_LOCATOR_CLASSES = config.CACHE_LOCATOR_CLASSES or LOCATORS
    compiled: Callable[..., Any] = numba.njit(function, nogil=True, cache=True)
    return compiled
