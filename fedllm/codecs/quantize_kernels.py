"""The loops of the block quantizers.

Shape legend: n values, N blocks of ``block`` values (the last may be shorter).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedllm.codecs.jit import kernel
from fedllm.codecs.stage import Accumulator, Values

Codes = NDArray[np.uint8]
Doubles = NDArray[np.float64]


def pack(codes: Codes, bits: int) -> bytes:
    """Pack codes of 8, 4, 2 or 1 bits into bytes, lowest bits first, the last byte padded with zeros."""
    if bits == 8:
        return codes.tobytes()
    packed = np.zeros(-(-len(codes) * bits // 8), np.uint8)
    _pack(codes, bits, packed)
    return packed.tobytes()


@kernel
def block_peaks(values: Values, block: int, peaks: Doubles) -> None:
    """Write the largest magnitude of each block; n values, N peaks."""
    bits = values.view(np.uint32)
    for b in range(peaks.size):
        part = bits[b * block : (b + 1) * block]
        largest = np.uint32(0)  # magnitudes order like their bits, and an integer maximum vectorizes
        for i in range(part.size):
            magnitude = np.uint32(part[i] & np.uint32(0x7FFFFFFF))
            largest = magnitude if magnitude > largest else largest
        peaks[b] = np.array([largest], np.uint32).view(np.float32)[0]


@kernel
def block_square_means(values: Values, block: int, means: Doubles) -> None:
    """Write the mean square of each block, summed in order in float64."""
    for b in range(means.size):
        part = values[b * block : (b + 1) * block]
        total = 0.0
        for i in range(part.size):
            total += np.float64(part[i]) * np.float64(part[i])
        means[b] = total / part.size


@kernel
def block_magnitude_means(values: Values, block: int, means: Doubles) -> None:
    """Write the mean magnitude of each block, summed in order in float64."""
    for b in range(means.size):
        part = values[b * block : (b + 1) * block]
        total = 0.0
        for i in range(part.size):
            total += abs(np.float64(part[i]))
        means[b] = total / part.size


@kernel
def integer_codes(values: Values, inverse: Doubles, block: int, limit: float, codes: NDArray[np.int8]) -> None:
    """Write ``round(value / step)``, ties to even, within +-limit; ``inverse`` holds 1/step by block."""
    for b in range(inverse.size):
        factor = inverse[b]
        part = values[b * block : (b + 1) * block]
        out = codes[b * block : (b + 1) * block]
        for i in range(part.size):
            out[i] = np.int8(min(max(np.rint(part[i] * factor), -limit), limit))


@kernel
def stochastic_codes(
    values: Values, inverse: Doubles, block: int, limit: float, codes: NDArray[np.int8], seed: np.uint64
) -> None:
    """Write ``floor(value / step + u_i)`` within +-limit; ``u_i`` in [0, 1) is splitmix64's output i + 1 for the seed."""
    for b in range(inverse.size):
        factor = inverse[b]
        part = values[b * block : (b + 1) * block]
        out = codes[b * block : (b + 1) * block]
        state = seed + np.uint64(b * block) * np.uint64(0x9E3779B97F4A7C15)
        for i in range(part.size):
            word = state + np.uint64(i + 1) * np.uint64(0x9E3779B97F4A7C15)
            word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            word = word ^ (word >> np.uint64(31))
            chance = np.float64(np.int64(word >> np.uint64(11))) * 2.0**-53
            out[i] = np.int8(min(max(np.floor(part[i] * factor + chance), -limit), limit))


@kernel
def float8_codes(values: Values, inverse: Doubles, block: int, codes: Codes) -> None:
    """Write the nearest E4M3 code of ``value / step``, ties to even, saturating at 448."""
    scaled = np.empty(block, np.float32)
    bits = scaled.view(np.uint32)
    for b in range(inverse.size):
        factor = inverse[b]
        part = values[b * block : (b + 1) * block]
        out = codes[b * block : (b + 1) * block]
        for i in range(part.size):
            scaled[i] = np.float32(part[i] * factor)
        for i in range(part.size):
            word = np.uint32(bits[i] & np.uint32(0x7FFFFFFF))
            normal = np.uint32((word + np.uint32(0x7FFFF) + ((word >> np.uint32(20)) & np.uint32(1))) >> np.uint32(20))
            subnormal = np.int32(np.rint(min(abs(scaled[i]), np.float32(1.0)) * np.float32(512.0)))
            code = np.int32(normal) - np.int32(960) if word >= np.uint32(0x3C800000) else subnormal  # 2^-6
            code = min(code, np.int32(0x7E))
            out[i] = np.uint8(code | np.int32((bits[i] >> np.uint32(24)) & np.uint32(0x80)))


@kernel
def nearest_codes(values: Values, inverse: Doubles, block: int, middles: Values, codes: Codes) -> None:
    """Write the number of ``middles`` (between neighbouring levels, increasing) that are at most ``value / step``."""
    scaled = np.empty(block, np.float32)
    counts = np.empty(block, np.uint32)
    for b in range(inverse.size):
        factor = inverse[b]
        part = values[b * block : (b + 1) * block]
        out = codes[b * block : (b + 1) * block]
        for i in range(part.size):
            scaled[i] = np.float32(part[i] * factor)
            counts[i] = np.uint32(0)
        for middle in middles:  # the outer loop, so that the inner one vectorizes
            for i in range(part.size):
                counts[i] += np.uint32(1) if scaled[i] >= middle else np.uint32(0)
        for i in range(part.size):
            out[i] = np.uint8(counts[i])


@kernel
def _pack(codes: Codes, bits: int, packed: Codes) -> None:
    whole = codes.size * bits // 8
    if bits == 4:
        for j in range(whole):
            packed[j] = codes[2 * j] | (codes[2 * j + 1] << np.uint8(4))
    elif bits == 2:
        for j in range(whole):
            part = codes[4 * j : 4 * j + 4]
            packed[j] = part[0] | (part[1] << np.uint8(2)) | (part[2] << np.uint8(4)) | (part[3] << np.uint8(6))
    else:
        for j in range(whole):
            byte = np.uint8(0)
            for k in range(8):
                byte |= codes[8 * j + k] << np.uint8(k)
            packed[j] = byte
    for i in range(whole * 8 // bits, codes.size):
        packed[whole] |= codes[i] << np.uint8(i * bits % 8)


@kernel
def add_integers(codes: Codes, steps: Values, block: int, accumulator: Accumulator, weight: np.floating) -> None:
    """Add ``weight * float32(step * code)`` for 8-bit two's complement codes; -128 counts as -127."""
    signed = codes.view(np.int8)
    for b in range(steps.size):
        step = steps[b]
        part = accumulator[b * block : (b + 1) * block]
        source = signed[b * block : (b + 1) * block]
        for i in range(part.size):
            part[i] += weight * (step * np.float32(max(source[i], np.int8(-127))))


@kernel
def add_levels(
    codes: Codes, steps: Values, levels: Values, block: int, accumulator: Accumulator, weight: np.floating
) -> None:
    """Add ``weight * float32(step * level[code])`` for 8-bit codes; float32 [256] levels."""
    for b in range(steps.size):
        step = steps[b]
        part = accumulator[b * block : (b + 1) * block]
        source = codes[b * block : (b + 1) * block]
        for i in range(part.size):
            part[i] += weight * (step * levels[source[i]])


@kernel
def add_packed(
    codes: Codes, steps: Values, levels: Values, bits: int, block: int, accumulator: Accumulator, weight: np.floating
) -> None:
    """Add ``weight * float32(step * level[code])`` for codes of 4, 2 or 1 bits; float32 [2^bits] levels."""
    products = np.zeros(16, accumulator.dtype)
    block_bytes = block * bits // 8
    for b in range(steps.size):
        for code in range(levels.size):
            products[code] = weight * (steps[b] * levels[code])
        part = accumulator[b * block : (b + 1) * block]
        source = codes[b * block_bytes : (b + 1) * block_bytes]
        whole = part.size * bits // 8
        if bits == 4:
            for j in range(whole):
                byte = source[j]
                part[2 * j] += products[byte & np.uint8(15)]
                part[2 * j + 1] += products[byte >> np.uint8(4)]
        elif bits == 2:
            for j in range(whole):
                byte = source[j]
                for k in range(4):
                    part[4 * j + k] += products[(byte >> np.uint8(2 * k)) & np.uint8(3)]
        else:
            for j in range(whole):
                byte = source[j]
                for k in range(8):
                    part[8 * j + k] += products[(byte >> np.uint8(k)) & np.uint8(1)]
        for i in range(whole * 8 // bits, part.size):
            shift = np.uint8(i * bits % 8)
            part[i] += products[(source[i * bits // 8] >> shift) & np.uint8((1 << bits) - 1)]
