"""Block quantizers: ``int8``, ``int4``, ``fp8``, ``nf4``, ``q2`` and ``sign``.

A flat array is cut into blocks (the last may be shorter); a block keeps one scale and a code per value. Scales are
binary16 times 2^E with one exponent E per tensor, so neither tiny nor huge updates lose them, or binary32 with ``f32``.
Scales of the ``peak`` kind are rounded up, so that no value lies outside the grid and stochastic rounding has no bias.

Parameters, all optional: block size, ``sr`` (stochastic rounding, integer grids only), ``f32``: ``int8:256:sr:f32``.
Bytes: int16 E and binary16 [N] scales (or binary32 [N] scales), then the codes, lowest bits first, the last byte padded
with zeros.

Shape legend: n values, N blocks.
"""

# ruff: noqa: D102 (the methods are described in fedllm.codecs.stage)

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedllm.codecs import quantize_kernels as kernels
from fedllm.codecs.dense import MAX_EXPONENT, read_exponent, tensor_exponent
from fedllm.codecs.grids import LLOYD_OUTER, Grid
from fedllm.codecs.params import read_block
from fedllm.codecs.stage import Accumulator, Buffer, Kind, Values
from fedllm.errors import ConfigError, CorruptPayloadError, NonFiniteError, explain

MAX_SCALE = (2.0 - 2.0**-10) * 2.0**127
"""Largest scale: the largest binary16 significand, so that no product with a level rounds to infinity."""

_MAX_SCALE_BITS = int(np.float32(MAX_SCALE).view(np.uint32))


@dataclass(frozen=True)
class BlockQuantizer:
    """A grid applied block by block.

    Attributes:
        grid: What codes mean.
        block: Values that share a scale.
        stochastic: Round up with the probability that makes the expectation exact.
        wide_scales: Keep binary32 scales.
    """

    grid: Grid
    block: int
    stochastic: bool = False
    wide_scales: bool = False

    version = 1
    kind = Kind.VALUES
    is_linear = False
    is_lossless = False

    @property
    def name(self) -> str:
        return self.grid.name

    @property
    def params(self) -> tuple[str, ...]:
        return (str(self.block), *(("sr",) if self.stochastic else ()), *(("f32",) if self.wide_scales else ()))

    def num_bytes(self, length: int) -> int:
        return self._codes_at(length) + -(-length * self.grid.bits // 8)

    def _codes_at(self, length: int) -> int:
        num_blocks = -(-length // self.block)
        return 4 * num_blocks if self.wide_scales else 2 + 2 * num_blocks

    def encode(self, values: Values, seed: int) -> bytes:
        data = self._round_scales(self._measure(values))
        steps = self._read_steps(data, len(values))
        inverse = np.divide(1.0, steps, where=steps > 0, out=np.zeros(len(steps)), dtype=np.float64)
        codes = np.empty(len(values), np.uint8)
        self._find_codes(values, inverse, codes, seed)
        return data + kernels.pack(codes & np.uint8((1 << self.grid.bits) - 1), self.grid.bits)

    def _measure(self, values: Values) -> NDArray[np.float64]:
        scales = np.empty(-(-len(values) // self.block))
        if self.grid.scale == "peak":
            kernels.block_peaks(values, self.block, scales)
        elif self.grid.scale == "rms":
            kernels.block_square_means(values, self.block, scales)
            scales = LLOYD_OUTER * np.sqrt(scales)
        else:
            kernels.block_magnitude_means(values, self.block, scales)
        return np.minimum(scales, MAX_SCALE)

    def _round_scales(self, scales: NDArray[np.float64]) -> bytes:
        """Return the bytes of float64 [N] scales."""
        if self.wide_scales:
            return scales.astype("<f4").tobytes()
        exponent = tensor_exponent(float(scales.max(initial=0.0)))
        normal = np.ldexp(scales, -exponent)
        halves = normal.astype("<f2")
        if self.grid.scale == "peak":
            short = halves < normal
            halves[short] = np.nextafter(halves[short], np.float16(np.inf))
        if exponent == MAX_EXPONENT:
            halves = np.minimum(halves, np.float16(32752))
        return np.array(exponent, "<i2").tobytes() + halves.tobytes()

    def _find_codes(self, values: Values, inverse: NDArray[np.float64], codes: NDArray[np.uint8], seed: int) -> None:
        limit = self.grid.divisor
        if self.stochastic:
            kernels.stochastic_codes(values, inverse, self.block, limit, codes.view(np.int8), np.uint64(seed))
        elif self.grid.rounding == "integer":
            kernels.integer_codes(values, inverse, self.block, limit, codes.view(np.int8))
        elif self.grid.rounding == "float8":
            kernels.float8_codes(values, inverse, self.block, codes)
        else:
            kernels.nearest_codes(values, inverse, self.block, self.grid.middles, codes)

    def check(self, buffer: Buffer, length: int) -> None:
        self._check_scales(buffer, length)
        codes = self._read_codes(buffer, length)
        used = length * self.grid.bits % 8
        if used and codes[-1] >> used:
            raise CorruptPayloadError(explain("padding bits are not zero", where=f"stage {self.name}"))
        if self.grid.rounding == "float8" and ((codes & 0x7F) == 0x7F).any():
            raise NonFiniteError(explain("an encoded tensor holds NaN", where="stage fp8"))

    def _check_scales(self, buffer: Buffer, length: int) -> None:
        """Refuse negative, infinite and too large scales; magnitudes order like their bits, negative ones above all."""
        num_blocks = -(-length // self.block)
        if self.wide_scales:
            is_bad = np.frombuffer(buffer, "<u4", count=num_blocks).max(initial=0) > _MAX_SCALE_BITS
        else:
            largest = np.frombuffer(buffer, "<u2", count=num_blocks, offset=2).max(initial=0)
            exponent = read_exponent(buffer)
            is_bad = largest >= 0x7C00 or math.ldexp(float(largest.view(np.float16)), exponent) > MAX_SCALE
        if is_bad:
            raise NonFiniteError(explain("a block's scale is no finite magnitude", where=f"stage {self.name}"))

    def decode(self, buffer: Buffer, length: int) -> Values:
        values = np.zeros(length, np.float32)
        self.add(buffer, values, 1.0)
        return values

    def add(self, buffer: Buffer, accumulator: Accumulator, weight: float) -> None:
        length = len(accumulator)
        codes, steps = self._read_codes(buffer, length), self._read_steps(buffer, length)
        factor = accumulator.dtype.type(weight)
        if self.grid.rounding == "integer" and self.grid.bits == 8:
            kernels.add_integers(codes, steps, self.block, accumulator, factor)
        elif self.grid.bits == 8:
            kernels.add_levels(codes, steps, self.grid.table, self.block, accumulator, factor)
        else:
            kernels.add_packed(codes, steps, self.grid.table, self.grid.bits, self.block, accumulator, factor)

    def _read_codes(self, buffer: Buffer, length: int) -> NDArray[np.uint8]:
        return np.frombuffer(buffer, np.uint8, offset=self._codes_at(length))

    def _read_steps(self, buffer: Buffer, length: int) -> Values:
        """Return float32 [N] steps from scales that are finite."""
        num_blocks = -(-length // self.block)
        if self.wide_scales:
            scales = np.frombuffer(buffer, "<f4", count=num_blocks).astype(np.float64)
        else:
            halves = np.frombuffer(buffer, "<f2", count=num_blocks, offset=2)
            scales = halves.astype(np.float64) * 2.0 ** read_exponent(buffer)
        return (scales / self.grid.divisor).astype(np.float32)


def make_quantizer(grid: Grid, params: Sequence[str]) -> BlockQuantizer:
    """Build a block quantizer from its parameter texts.

    Raises:
        ConfigError: A parameter is unknown, or ``sr`` is asked of a grid without equal steps.
    """
    rest = list(params)
    block = read_block(grid.name, rest.pop(0)) if rest and rest[0].isdigit() else grid.default_block
    flags = set(rest)
    if len(flags) != len(rest) or not flags <= {"sr", "f32"}:
        raise ConfigError(
            explain(
                f"codec stage {grid.name!r} has unknown parameters",
                expected="[block][:sr][:f32]",
                found=":".join(params),
            )
        )
    if "sr" in flags and grid.rounding != "integer":
        raise ConfigError(
            explain("stochastic rounding needs a grid of equal steps", expected="int8 or int4", found=grid.name)
        )
    return BlockQuantizer(grid, block, "sr" in flags, "f32" in flags)
