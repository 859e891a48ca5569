"""Where virtual tokens stand in a sequence: plain NumPy.

Shape legend: L tokens of a sequence, S examples packed into it, M virtual tokens.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedllm.data.sequences import Sequence

REAL = -1
"""Stands where a token is not a virtual one."""


def with_places(row: Sequence, num_tokens: int) -> tuple[Sequence, NDArray[np.int64]]:
    """Make room for a prompt before every example of a sequence.

    Places have token 0, are no targets, and belong to their example's segment, so nobody else attends to them.

    Returns:
        The longer sequence, and int64 [L + S M] with the number of the virtual token at each place, :data:`REAL` elsewhere.
    """
    starts = np.flatnonzero(np.diff(row.segment_ids, prepend=0))  # [S]
    before = np.repeat(starts, num_tokens)
    longer = Sequence(
        np.insert(row.input_ids, before, 0),
        np.insert(row.target_mask, before, False),
        np.insert(row.segment_ids, before, row.segment_ids[before]),
    )
    numbers = np.tile(np.arange(num_tokens), len(starts))
    return longer, np.insert(np.full(len(row), REAL, np.int64), before, numbers)


def unpacked(row: Sequence) -> list[Sequence]:
    """Return the examples of a packed sequence as sequences of their own, in order."""
    starts = np.flatnonzero(np.diff(row.segment_ids, prepend=0))[1:]
    parts = (np.split(array, starts) for array in (row.input_ids, row.target_mask))
    return [Sequence(ids, targets, np.ones(len(ids), np.int32)) for ids, targets in zip(*parts, strict=True)]
