"""Stages that pick coordinates: ``delta`` (none, but related), ``segment``, ``mask``, ``topk``, ``randk``.

- ``delta``: the values are differences to a reference, the state that the receiver really decoded.
- ``segment:N``: the whole adapter, flattened in layout order, is cut into N parts; a site sends part
  ``(site_index + round) mod N`` and says nothing about the others (Liu et al., EcoLoRA, EMNLP 2025, arXiv 2506.02001).
- ``mask:p``: the share p of coordinates where the reference is largest in magnitude; both ends hold the reference, so no
  position travels (after Kuo et al., FLASC, arXiv 2406.05233). We take the share within each tensor: over all tensors at
  once, an adapter that starts with B = 0 would never pick from B.
- ``topk:p``: the share p of largest magnitude, the others count as zero (Aji and Heafield, EMNLP 2017, arXiv 1704.05021).
  Exact; of equal magnitudes the lower positions win.
- ``randk:p``: one random coordinate from each of k equal strata, drawn from the shared seed, the round and the tensor's
  name, so all sites of a round pick the same and no position travels; the others count as zero. Linear. By default the
  values travel as they are (a contraction, for error feedback); ``randk:p:unbiased`` multiplies each by the size of its
  stratum, which makes the expectation exact (Stich et al., NeurIPS 2018, arXiv 1809.07599, section 2).
"""

# ruff: noqa: D102, ARG002 (the methods are described in fedllm.codecs.stage)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedllm.codecs.largest import largest
from fedllm.codecs.params import at_most, no_params, read_fraction, read_int
from fedllm.codecs.stage import Kind, Positions, TensorView, Values
from fedllm.errors import ConfigError, NonFiniteError, explain
from fedllm.rng import derive

MAX_SEGMENTS = 100_000
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Delta:
    """Marks values as a difference; the encoder subtracts the reference unless its caller already has."""

    name = "delta"
    version = 1
    kind = Kind.DIFFERENCE
    params = ()
    is_linear = True
    is_lossless = False


@dataclass(frozen=True)
class Segment:
    """One of ``num_segments`` consecutive parts of the flattened adapter, in turn."""

    num_segments: int

    name = "segment"
    version = 1
    kind = Kind.SEGMENT
    is_linear = True
    is_lossless = False
    positions_travel = False
    covers_all = False

    @property
    def params(self) -> tuple[str, ...]:
        return (str(self.num_segments),)

    def count(self, view: TensorView, length: int) -> int:
        part = self._part(view, length)
        return int(part.stop - part.start)

    def pick(self, view: TensorView, length: int, values: Values | None, reference: Values | None) -> Positions:
        return self._part(view, length)

    def gather(self, values: Values, positions: Positions) -> Values:
        return values[positions]

    def _part(self, view: TensorView, length: int) -> slice:
        turn = (view.site_index + view.round) % self.num_segments
        start = view.total * turn // self.num_segments - view.offset
        stop = view.total * (turn + 1) // self.num_segments - view.offset
        return slice(min(max(start, 0), length), min(max(stop, 0), length))


@dataclass(frozen=True)
class Mask:
    """The coordinates where the reference is largest in magnitude."""

    fraction: float

    name = "mask"
    version = 1
    kind = Kind.MASK
    is_linear = True
    is_lossless = False
    positions_travel = False
    covers_all = False

    @property
    def params(self) -> tuple[str, ...]:
        return (repr(self.fraction),)

    def count(self, view: TensorView, length: int) -> int:
        return num_picked(self.fraction, length)

    def pick(self, view: TensorView, length: int, values: Values | None, reference: Values | None) -> Positions:
        assert reference is not None, "mask needs the reference"
        return largest(reference, self.count(view, length))

    def gather(self, values: Values, positions: Positions) -> Values:
        return values[positions]


@dataclass(frozen=True)
class TopK:
    """The coordinates of largest magnitude; the others count as zero."""

    fraction: float

    name = "topk"
    version = 1
    kind = Kind.SPARSE
    is_linear = False
    is_lossless = False
    positions_travel = True
    covers_all = True

    @property
    def params(self) -> tuple[str, ...]:
        return (repr(self.fraction),)

    def count(self, view: TensorView, length: int) -> int:
        return num_picked(self.fraction, length)

    def pick(self, view: TensorView, length: int, values: Values | None, reference: Values | None) -> Positions:
        assert values is not None, "the positions of topk travel"
        return largest(values, self.count(view, length))

    def gather(self, values: Values, positions: Positions) -> Values:
        return values[positions]


@dataclass(frozen=True)
class RandK:
    """One coordinate from each of k strata, the same for all sites of a round; the others count as zero."""

    fraction: float
    unbiased: bool = False

    name = "randk"
    version = 1
    kind = Kind.SPARSE
    is_linear = True
    is_lossless = False
    positions_travel = False
    covers_all = True

    @property
    def params(self) -> tuple[str, ...]:
        return (repr(self.fraction), *(("unbiased",) if self.unbiased else ()))

    def count(self, view: TensorView, length: int) -> int:
        return num_picked(self.fraction, length)

    def pick(self, view: TensorView, length: int, values: Values | None, reference: Values | None) -> Positions:
        starts, sizes = _strata(length, self.count(view, length))
        draws = splitmix64(derive(view.seed, view.round, "", f"randk:{view.name}"), len(starts))
        return starts + (draws % sizes.astype(np.uint64)).astype(np.int64)

    def gather(self, values: Values, positions: Positions) -> Values:
        picked = values[positions]
        if not self.unbiased:
            return picked
        with np.errstate(over="ignore"):
            scaled: Values = picked * _strata(len(values), len(picked))[1].astype(np.float32)
        if not np.isfinite(scaled).all():
            raise NonFiniteError(explain("a value overflows when scaled by its stratum", where="stage randk"))
        return scaled


def num_picked(fraction: float, length: int) -> int:
    """Return ``floor(fraction * length + 1/2)``, at least 1 and at most ``length``."""
    return min(length, max(1, int(fraction * length + 0.5)))


def _strata(length: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return int64 [count] starts and sizes of consecutive strata; the first ``length % count`` are one larger."""
    if not count:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    size, larger = divmod(length, count)
    index = np.arange(count, dtype=np.int64)
    return index * size + np.minimum(index, larger), size + (index < larger)


def splitmix64(seed: int, count: int) -> NDArray[np.uint64]:
    """Return the first ``count`` outputs of Steele, Lea and Flood's SplitMix64 (OOPSLA 2014) for a seed."""
    word = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


def make_delta(params: Sequence[str]) -> Delta:
    """Build the stage ``delta``."""
    no_params(Delta.name, params)
    return Delta()


def make_segment(params: Sequence[str]) -> Segment:
    """Build the stage ``segment`` from the number of segments."""
    at_most(Segment.name, params, 1)
    return Segment(read_int(Segment.name, params[0] if params else "", 2, MAX_SEGMENTS, "number of segments"))


def make_mask(params: Sequence[str]) -> Mask:
    """Build the stage ``mask`` from its share."""
    at_most(Mask.name, params, 1)
    return Mask(read_fraction(Mask.name, params))


def make_topk(params: Sequence[str]) -> TopK:
    """Build the stage ``topk`` from its share."""
    at_most(TopK.name, params, 1)
    return TopK(read_fraction(TopK.name, params))


def make_randk(params: Sequence[str]) -> RandK:
    """Build the stage ``randk`` from its share and, optionally, the word ``unbiased``."""
    if len(params) > 1 and params[1:] != ["unbiased"]:
        raise ConfigError(
            explain("codec stage 'randk' has unknown parameters", expected="p[:unbiased]", found=":".join(params))
        )
    return RandK(read_fraction(RandK.name, params), len(params) > 1)
