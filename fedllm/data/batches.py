"""An endless stream of batches, the same for the same seed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice

from fedllm.data.sequences import Sequence
from fedllm.errors import DataError, explain
from fedllm.rng import generator


def batch_stream(sequences: list[Sequence], batch_size: int, rng_seed: int) -> Iterator[list[Sequence]]:
    """Yield batches for ever, each epoch in a new order.

    Every batch is full: one that an epoch cannot fill goes on with the next epoch, so each sequence is seen equally
    often up to one.

    Args:
        sequences: At least one.
        batch_size: Sequences in a batch, at least 1.
        rng_seed: Seed of the orders, from :func:`fedllm.rng.derive`.

    Raises:
        DataError: There is no sequence.
    """
    if not sequences:
        raise DataError(explain("there is nothing to train on", expected="at least one sequence", found="none"))
    stream = _shuffled_for_ever(sequences, rng_seed)
    return iter(lambda: list(islice(stream, batch_size)), [])


def _shuffled_for_ever(sequences: list[Sequence], rng_seed: int) -> Iterator[Sequence]:
    for epoch in count():
        order = generator(rng_seed, purpose=f"batches of epoch {epoch}").permutation(len(sequences))
        yield from (sequences[i] for i in order)
