"""``rice``: sparse positions as Golomb-Rice coded gaps.

Gaps ``g_0 = i_0``, ``g_j = i_j - i_{j-1} - 1`` of a random subset with density p are geometric, for which a Rice code with
``r = ceil(log2(-ln 2 / ln(1 - p)))`` is near the entropy (Golomb 1966; Rice 1979; Kiely, JPL TDA PR 42-159, 2004). Real
updates cluster, so the encoder also tries the neighbouring parameters, and 0, and keeps the shortest.

Bytes: none without positions. Else one byte r (0 to 40), then for each gap ``g >> r`` zero bits, a one bit, and the r low
bits of g. Bits fill bytes from the lowest, numbers too; the last byte is padded with zeros. With r = 0 this is a bitmap
that ends at the last position, so the code never needs more than one bit per coordinate.
"""

# ruff: noqa: D102 (the methods are described in fedllm.codecs.stage)

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedllm.codecs.jit import kernel
from fedllm.codecs.params import no_params
from fedllm.codecs.stage import Buffer, Kind
from fedllm.errors import CorruptPayloadError, explain

MAX_RICE = 40


@dataclass(frozen=True)
class Rice:
    """Rice-coded gaps between positions."""

    name = "rice"
    version = 1
    kind = Kind.INDEX
    params = ()
    is_linear = True
    is_lossless = True

    def max_bytes(self, length: int, count: int) -> int:
        return 1 + -(-length // 8) if count else 0

    def encode(self, positions: NDArray[np.int64], length: int) -> bytes:
        if not len(positions):
            return b""
        gaps = np.diff(positions, prepend=-1) - 1
        num_bits, rice = min((_num_bits(gaps, rice), rice) for rice in _candidates(len(positions) / length))
        if not rice:
            return b"\0" + _bitmap(positions)
        coded = np.zeros(-(-num_bits // 8), np.uint8)
        _write(gaps, rice, coded)
        return bytes([rice]) + coded.tobytes()

    def decode(self, buffer: Buffer, length: int, count: int) -> NDArray[np.int64]:
        if not count:
            _require(len(buffer) == 0, "bytes behind the last position")
            return np.zeros(0, np.int64)
        _require(len(buffer) > 0, "no positions")
        _require(buffer[0] <= MAX_RICE, f"parameter {buffer[0]}, at most {MAX_RICE} is possible")
        body = np.frombuffer(buffer, np.uint8, offset=1)
        if not buffer[0]:
            return _read_bitmap(body, length, count)
        positions = np.empty(count, np.int64)
        problem = _read(body, int(buffer[0]), length, positions)
        _require(
            problem == 0, ("", "positions beyond the tensor", "too few bits", "bits behind the last position")[problem]
        )
        return positions


def make_rice(params: Sequence[str]) -> Rice:
    """Build the stage ``rice``."""
    no_params(Rice.name, params)
    return Rice()


def best_rice(density: float) -> int:
    """Return the Rice parameter for geometric gaps of a random subset with this density."""
    if density >= 0.5:
        return 0
    return max(0, math.ceil(math.log2(-math.log(2) / math.log1p(-density))))


def _candidates(density: float) -> set[int]:
    best = best_rice(density)
    return {0, *range(max(0, best - 2), min(MAX_RICE, best + 1) + 1)}


def _num_bits(gaps: NDArray[np.int64], rice: int) -> int:
    return int((gaps >> rice).sum()) + len(gaps) * (1 + rice)


def _bitmap(positions: NDArray[np.int64]) -> bytes:
    """Return the code with r = 0."""
    bits = np.zeros(int(positions[-1]) + 1, np.uint8)
    bits[positions] = 1
    return np.packbits(bits, bitorder="little").tobytes()


def _read_bitmap(body: NDArray[np.uint8], length: int, count: int) -> NDArray[np.int64]:
    _require(len(body) <= -(-length // 8), "positions beyond the tensor")
    bits = np.unpackbits(body, bitorder="little").view(np.bool_)
    found = int(np.count_nonzero(bits))  # before positions are allocated for them
    _require(found >= count, "too few bits")
    _require(found == count and bool(body[-1]), "bits behind the last position")
    positions = np.flatnonzero(bits)
    _require(bool(positions[-1] < length), "positions beyond the tensor")
    return positions


def _require(condition: bool, found: str) -> None:
    if not condition:
        raise CorruptPayloadError(explain("coded positions are damaged", found=found, where="stage rice"))


@kernel
def _write(gaps: NDArray[np.int64], rice: int, coded: NDArray[np.uint8]) -> None:
    window = np.uint64(0)  # bits not yet written, lowest first; always fewer than 8 between two numbers
    filled = 0
    at = 0
    for i in range(gaps.size):
        gap = gaps[i]
        filled += gap >> rice
        while filled >= 8:
            coded[at] = np.uint8(window & np.uint64(255))
            window = window >> np.uint64(8)
            at += 1
            filled -= 8
        low = np.uint64(gap) & ((np.uint64(1) << np.uint64(rice)) - np.uint64(1))
        window |= (np.uint64(1) | (low << np.uint64(1))) << np.uint64(filled)
        filled += 1 + rice
        while filled >= 8:
            coded[at] = np.uint8(window & np.uint64(255))
            window = window >> np.uint64(8)
            at += 1
            filled -= 8
    if filled:
        coded[at] = np.uint8(window & np.uint64(255))


@kernel
def _read(body: NDArray[np.uint8], rice: int, length: int, positions: NDArray[np.int64]) -> int:
    """Fill positions; return 0, or 1 beyond the tensor, 2 too few bits, 3 bits left over."""
    window = np.uint64(0)
    filled = 0
    at = 0
    position = -1
    mask = (np.uint64(1) << np.uint64(rice)) - np.uint64(1)
    for i in range(positions.size):
        quotient = 0
        while True:
            while filled <= 56 and at < body.size:
                window |= np.uint64(body[at]) << np.uint64(filled)
                filled += 8
                at += 1
            if window != np.uint64(0):
                break
            quotient += filled
            filled = 0
            if at == body.size:
                return 2
        zeros = 0
        while window & np.uint64(255) == np.uint64(0):
            window = window >> np.uint64(8)
            zeros += 8
        while window & np.uint64(1) == np.uint64(0):
            window = window >> np.uint64(1)
            zeros += 1
        window = window >> np.uint64(1)
        filled -= zeros + 1
        while filled <= 56 and at < body.size:
            window |= np.uint64(body[at]) << np.uint64(filled)
            filled += 8
            at += 1
        if filled < rice:
            return 2
        quotient += zeros
        if quotient > length >> rice:
            return 1
        position += 1 + ((quotient << rice) | int(window & mask))
        if position >= length:
            return 1
        window = window >> np.uint64(rice)
        filled -= rice
        positions[i] = position
    if at < body.size or filled >= 8 or window != np.uint64(0):
        return 3
    return 0
