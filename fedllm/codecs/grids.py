"""The number grids of the block quantizers: which values a code can stand for.

A decoded value is ``float32(step * level[code])``, where ``step = float32(scale / divisor)`` belongs to the block. What a
scale is differs: the block's largest magnitude for the uniform and floating grids, a multiple of its root mean square or
its mean magnitude for the two coarse ones.

Sources: NF4 from Dettmers et al., QLoRA, NeurIPS 2023, arXiv 2305.14314 (the table of bitsandbytes); FP8 E4M3 from
Micikevicius et al., arXiv 2209.05433; the two-bit grid is the Lloyd-Max quantizer of a unit Gaussian (Max, IRE Trans. IT
1960); sign with mean magnitude from Bernstein et al., signSGD, ICML 2018, arXiv 1802.04434, and Karimireddy et al., ICML
2019, arXiv 1901.09847.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Rounding = Literal["integer", "nearest", "float8"]
ScaleKind = Literal["peak", "rms", "mean"]


@dataclass(frozen=True)
class Grid:
    """What the codes of one quantizer mean.

    Attributes:
        name: The stage's name.
        bits: Bits of a code: 8, 4, 2 or 1.
        levels: What each code stands for, before the step; 2^bits numbers, exact in float32.
        divisor: ``step = scale / divisor``.
        scale: What the scale measures.
        rounding: How the encoder finds a code.
        default_block: Values that share a scale, unless the pipeline says otherwise.
    """

    name: str
    bits: int
    levels: tuple[float, ...]
    divisor: float
    scale: ScaleKind
    rounding: Rounding
    default_block: int

    @cached_property
    def table(self) -> NDArray[np.float32]:
        """The levels as float32 [2^bits]."""
        return np.array(self.levels, np.float32)

    @cached_property
    def middles(self) -> NDArray[np.float32]:
        """Midpoints between neighbouring levels, float32 [2^bits - 1]; increasing where rounding is `nearest`."""
        table = self.table
        return (table[1:] + table[:-1]) / np.float32(2)


def _two_complement(bits: int) -> tuple[float, ...]:
    """Return the levels of signed codes; the most negative one, which no encoder writes, saturates."""
    half = 1 << (bits - 1)
    return tuple(float(code if code < half else max(code - 2 * half, 1 - half)) for code in range(2 * half))


def _e4m3() -> tuple[float, ...]:
    """Return the 256 values of FP8 E4M3; codes 0x7F and 0xFF are NaN."""
    positive = [code / 512 if code < 8 else (8 + code % 8) * 2.0 ** (code // 8 - 10) for code in range(127)]
    positive.append(float("nan"))
    return (*positive, *(-value for value in positive))


def _float32(*numbers: float) -> tuple[float, ...]:
    return tuple(float(np.float32(number)) for number in numbers)


INT8 = Grid("int8", 8, _two_complement(8), 127.0, "peak", "integer", 256)
INT4 = Grid("int4", 4, _two_complement(4), 7.0, "peak", "integer", 64)
FP8 = Grid("fp8", 8, _e4m3(), 448.0, "peak", "float8", 256)

NF4 = Grid(
    "nf4",
    4,
    _float32(
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    1.0,
    "peak",
    "nearest",
    64,
)

LLOYD_OUTER = 1.5104176
"""Outer level of the four-level Lloyd-Max quantizer of a unit Gaussian; the inner one is 0.4527800."""

Q2 = Grid("q2", 2, _float32(-1.0, -0.4527800 / LLOYD_OUTER, 0.4527800 / LLOYD_OUTER, 1.0), 1.0, "rms", "nearest", 64)
SIGN = Grid("sign", 1, (-1.0, 1.0), 1.0, "mean", "nearest", 256)

GRIDS = (INT8, INT4, FP8, NF4, Q2, SIGN)
