"""Token sequences for tests, made of random ids."""

from __future__ import annotations

import numpy as np

from fedllm.data.sequences import Sequence
from fedllm.rng import generator


def example(length: int, seed: int, *, first_target: int = 1, vocabulary: int = 259) -> Sequence:
    """Return one example whose tokens from `first_target` on are targets."""
    ids = generator(seed, purpose="text").integers(3, vocabulary, length).astype(np.int32)
    mask = np.arange(length) >= max(1, first_target)
    return Sequence(ids, mask, np.ones(length, np.int32))


def packed(*examples: Sequence) -> Sequence:
    """Put examples into one sequence."""
    return Sequence(
        np.concatenate([part.input_ids for part in examples]),
        np.concatenate([part.target_mask for part in examples]),
        np.concatenate([np.full(len(part), index + 1, np.int32) for index, part in enumerate(examples)]),
    )
