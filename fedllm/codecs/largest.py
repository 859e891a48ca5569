"""The positions of the k largest magnitudes, exactly and at memory speed.

Magnitudes of float32 order like their bits without the sign. A histogram of the upper 12 of these 31 bits finds the bin
that holds the k-th largest; only that bin's members are then partitioned. Small arrays are partitioned at once.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedllm.codecs.dense import read_only
from fedllm.codecs.jit import kernel
from fedllm.codecs.stage import Values

_BINS = 1 << 12


def largest(values: Values, count: int) -> NDArray[np.int64]:
    """Return int64 [count], increasing: where finite float32 [n] is largest in magnitude; of equals the first."""
    positions = np.empty(count + 1, np.int64)
    if count:
        bits = read_only(values.view(np.uint32))
        threshold, num_ties = _threshold(bits, count)
        _emit(bits, np.uint32(threshold), num_ties, positions)
    return positions[:count]


def _threshold(bits: NDArray[np.uint32], count: int) -> tuple[int, int]:
    """Return the magnitude bits of the count-th largest, and how many that equal it are among the largest."""
    members, wanted = _narrowed(bits, count) if bits.size > _BINS * 4 else (bits & np.uint32(0x7FFFFFFF), count)
    ordered = np.partition(members, len(members) - wanted)[len(members) - wanted :]
    return int(ordered[0]), int((ordered == ordered[0]).sum())


def _narrowed(bits: NDArray[np.uint32], count: int) -> tuple[NDArray[np.uint32], int]:
    """Return the magnitudes in the bin that holds the count-th largest, and how many of them are among the largest."""
    histogram = np.zeros(_BINS, np.int64)
    _count_bins(bits, histogram)
    at_least = np.cumsum(histogram[::-1])[::-1]  # values in this bin or above
    bin_ = int(np.flatnonzero(at_least >= count)[-1])
    members = np.empty(int(histogram[bin_]) + 1, np.uint32)
    _collect(bits, np.uint32(bin_), members)
    return members[:-1], count - (int(at_least[bin_]) - len(members) + 1)


@kernel
def _count_bins(bits: NDArray[np.uint32], histogram: NDArray[np.int64]) -> None:
    for i in range(bits.size):
        histogram[(bits[i] & np.uint32(0x7FFFFFFF)) >> np.uint32(19)] += 1


# The next two write every candidate and advance only past those that count, because a branch would be mispredicted about
# once for each. Their output has one element of slack for the last write.


@kernel
def _collect(bits: NDArray[np.uint32], bin_: np.uint32, members: NDArray[np.uint32]) -> None:
    found = np.uint64(0)
    for i in range(bits.size):
        magnitude = np.uint32(bits[i] & np.uint32(0x7FFFFFFF))
        members[found] = magnitude
        found += np.uint64(magnitude >> np.uint32(19) == bin_)


@kernel
def _emit(bits: NDArray[np.uint32], threshold: np.uint32, num_ties: int, positions: NDArray[np.int64]) -> None:
    found = np.uint64(0)
    ties = np.int64(num_ties)
    for i in range(bits.size):
        magnitude = np.uint32(bits[i] & np.uint32(0x7FFFFFFF))
        is_tie = magnitude == threshold
        positions[found] = i
        found += np.uint64((magnitude > threshold) | (is_tie & (ties > 0)))
        ties -= np.int64(is_tie)
