"""Several short examples in one sequence, so that little of a batch is padding.

First-fit decreasing (Johnson, "Near-optimal bin packing algorithms", 1973): examples from the longest to the shortest,
each into the first sequence with room; at most 11/9 of the fewest possible sequences, plus a constant. Attention and
loss must not cross segments; ``segment_ids`` tells them apart.
"""

from __future__ import annotations

import numpy as np

from fedllm.data.sequences import Sequence


def pack(sequences: list[Sequence], max_length: int) -> list[Sequence]:
    """Pack sequences into as few as first-fit decreasing finds.

    The result depends on the order of ``sequences`` only among equally long ones. Takes O(n log n).

    Args:
        sequences: Each of at most ``max_length`` tokens, with segments 1, 2, ... in any number.
        max_length: Tokens that fit in one packed sequence.

    Returns:
        Packed sequences whose segments, numbered 1, 2, ..., are the given ones unchanged.
    """
    longest = max(map(len, sequences), default=0)
    assert longest <= max_length, f"a sequence of {longest} tokens does not fit {max_length}"
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))  # stable: ties keep their order
    room = _FirstFit(len(sequences), max_length)
    bins: list[list[Sequence]] = []
    for i in order:
        index = room.place(len(sequences[i]))
        bins += [[]] if index == len(bins) else []
        bins[index].append(sequences[i])
    return [_join(members) for members in bins]


class _FirstFit:
    """Finds the first of n bins with room in O(log n): a complete binary tree of the largest room below each node."""

    def __init__(self, num_bins: int, capacity: int) -> None:
        self._num_leaves = 1 << max(num_bins - 1, 0).bit_length()
        self._room = [capacity] * (2 * self._num_leaves)

    def place(self, size: int) -> int:
        """Take ``size`` from the first bin that has it and return the bin's index."""
        node = 1
        while node < self._num_leaves:
            node = 2 * node if self._room[2 * node] >= size else 2 * node + 1
        self._room[node] -= size
        index = node - self._num_leaves
        while node > 1:
            node //= 2
            self._room[node] = max(self._room[2 * node], self._room[2 * node + 1])
        return index


def _join(members: list[Sequence]) -> Sequence:
    before = np.cumsum([0] + [int(member.segment_ids.max(initial=0)) for member in members[:-1]])
    segments = [member.segment_ids + np.int32(shift) for member, shift in zip(members, before, strict=True)]
    return Sequence(
        np.concatenate([member.input_ids for member in members]),
        np.concatenate([member.target_mask for member in members]),
        np.concatenate(segments),
    )
