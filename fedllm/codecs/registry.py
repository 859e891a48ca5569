"""All codec stages by name and version.

A stage of your own in a few lines::

    @dataclass(frozen=True)
    class Half:
        name, version, kind, params, is_linear, is_lossless = "half", 1, Kind.VALUES, (), False, False
        ...  # the methods of fedllm.codecs.stage.ValuesStage

    register("half", 1, lambda params: Half())

Both ends must register it. ``tests/contracts/test_codecs.py`` runs over everything in :data:`STAGES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from fedllm.codecs import dense, select
from fedllm.codecs.grids import GRIDS
from fedllm.codecs.quantize import make_quantizer
from fedllm.codecs.rice import make_rice
from fedllm.codecs.stage import Stage
from fedllm.codecs.zstd import make_zstd
from fedllm.errors import ConfigError, explain

Factory = Callable[[Sequence[str]], Stage]
"""Builds a stage from its parameter texts, raising :class:`ConfigError` for what it cannot be."""

STAGES: dict[tuple[str, int], Factory] = {}
"""Factories by (name, version). Add with :func:`register`."""


def register(name: str, version: int, factory: Factory) -> None:
    """Add a stage.

    Raises:
        ConfigError: The name and version are taken.
    """
    if (name, version) in STAGES:
        raise ConfigError(explain("a codec stage is registered twice", found=f"{name}@{version}"))
    STAGES[name, version] = factory


def latest_version(name: str) -> int:
    """Return the newest registered version of a stage, 0 if the name is unknown."""
    return max((version for known, version in STAGES if known == name), default=0)


def known_names() -> tuple[str, ...]:
    """Return the names of all stages, sorted."""
    return tuple(sorted({name for name, _ in STAGES}))


register("fp32", 1, dense.make_fp32)
register("bf16", 1, dense.make_bf16)
register("fp16", 1, dense.make_fp16)
for _grid in GRIDS:
    register(_grid.name, 1, partial(make_quantizer, _grid))
register("delta", 1, select.make_delta)
register("segment", 1, select.make_segment)
register("mask", 1, select.make_mask)
register("topk", 1, select.make_topk)
register("randk", 1, select.make_randk)
register("rice", 1, make_rice)
register("zstd", 1, make_zstd)
