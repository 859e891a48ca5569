"""Batches: endless, full, fair, and the same for the same seed."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.data.batches import batch_stream
from fedllm.data.sequences import Sequence
from fedllm.errors import DataError

sizes = st.integers(1, 12)


def numbered(num_sequences):
    return [Sequence(np.array([i], np.int32), np.zeros(1, bool), np.ones(1, np.int32)) for i in range(num_sequences)]


def drawn(num_sequences, batch_size, seed, num_batches):
    stream = batch_stream(numbered(num_sequences), batch_size, seed)
    return [[int(each.input_ids[0]) for each in batch] for batch in islice(stream, num_batches)]


@given(sizes, sizes, st.integers(1, 30))
def test_batches_are_full_and_every_epoch_sees_each_sequence_once(num_sequences, batch_size, num_batches):
    batches = drawn(num_sequences, batch_size, 0, num_batches)
    assert [len(batch) for batch in batches] == [batch_size] * num_batches
    flat = [i for batch in batches for i in batch]
    for start in range(0, len(flat) - num_sequences + 1, num_sequences):
        assert sorted(flat[start : start + num_sequences]) == list(range(num_sequences))


@given(sizes, sizes, st.integers(0, 2**63))
def test_the_same_seed_gives_the_same_batches(num_sequences, batch_size, seed):
    assert drawn(num_sequences, batch_size, seed, 9) == drawn(num_sequences, batch_size, seed, 9)


def test_epochs_and_seeds_have_orders_of_their_own():
    epochs = [tuple(batch) for seed in (0, 1) for batch in drawn(50, 50, seed, 4)]
    assert len(set(epochs)) == 8


def test_the_order_is_the_same_in_every_release():
    assert drawn(6, 3, 42, 4) == [[5, 1, 4], [0, 2, 3], [0, 1, 2], [5, 4, 3]]


def test_nothing_to_train_on_is_an_error_at_once():
    with pytest.raises(DataError, match="nothing to train on"):
        batch_stream([], 4, 0)
