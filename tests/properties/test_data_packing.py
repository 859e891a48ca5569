"""Packing: nothing is lost, nothing overflows, and the result is first-fit decreasing."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.data.packing import pack
from fedllm.data.sequences import Sequence

MAX_LENGTH = 16


def sequence(first_token, length, num_segments=1):
    ids = np.arange(first_token, first_token + length, dtype=np.int32)
    mask = ids % 3 == 0
    mask[0] = False
    segments = np.minimum(np.arange(length) + 1, num_segments).astype(np.int32)
    return Sequence(ids, mask, segments)


def sequences_of(lengths):
    return [sequence(1000 * i, length) for i, length in enumerate(lengths)]


def segments_of(packed):
    """Return every segment as (token ids, targets), from all sequences."""
    return [
        (tuple(each.input_ids[each.segment_ids == n]), tuple(each.target_mask[each.segment_ids == n]))
        for each in packed
        for n in range(1, each.segment_ids.max() + 1)
    ]


def first_fit_decreasing(lengths):
    """The textbook algorithm on lengths alone."""
    bins = []
    for length in sorted(lengths, reverse=True):
        fitting = next((each for each in bins if sum(each) + length <= MAX_LENGTH), None)
        if fitting is None:
            bins.append([length])
        else:
            fitting.append(length)
    return bins


lengths = st.lists(st.integers(1, MAX_LENGTH), max_size=60)


@given(lengths)
def test_segments_stay_intact_and_none_is_lost(lengths):
    given_ = sequences_of(lengths)
    assert Counter(segments_of(pack(given_, MAX_LENGTH))) == Counter(segments_of(given_))


@given(lengths)
def test_no_sequence_is_too_long_and_segments_follow_each_other(lengths):
    for packed in pack(sequences_of(lengths), MAX_LENGTH):
        assert len(packed) <= MAX_LENGTH
        assert len(packed) == len(packed.target_mask) == len(packed.segment_ids)
        steps = np.diff(packed.segment_ids, prepend=0)
        assert steps[0] == 1
        assert set(steps) <= {0, 1}
        assert not packed.target_mask[steps == 1].any()
        dtypes = (packed.input_ids.dtype, packed.target_mask.dtype, packed.segment_ids.dtype)
        assert dtypes == (np.int32, np.bool_, np.int32)


@given(lengths)
def test_packing_is_the_textbook_first_fit_decreasing(lengths):
    packed = pack(sequences_of(lengths), MAX_LENGTH)
    by_segment = [list(np.bincount(each.segment_ids)[1:]) for each in packed]
    assert by_segment == first_fit_decreasing(lengths)


@given(lengths, st.randoms(use_true_random=False))
def test_the_order_of_the_input_does_not_change_how_much_is_packed_where(lengths, random):
    shuffled = random.sample(lengths, len(lengths))
    one, other = pack(sequences_of(lengths), MAX_LENGTH), pack(sequences_of(shuffled), MAX_LENGTH)
    assert [list(each.segment_ids) for each in one] == [list(each.segment_ids) for each in other]


@given(st.lists(st.tuples(st.integers(4, MAX_LENGTH), st.integers(1, 4)), max_size=20))
def test_already_packed_sequences_are_packed_further(shapes):
    given_ = [sequence(1000 * i, length, segments) for i, (length, segments) in enumerate(shapes)]
    assert Counter(segments_of(pack(given_, MAX_LENGTH))) == Counter(segments_of(given_))


def test_equal_lengths_keep_their_order():
    packed = pack(sequences_of([8] * 5), MAX_LENGTH)
    assert [each.input_ids[0] for each in packed] == [0, 2000, 4000]


def test_a_sequence_that_cannot_fit_is_a_programming_error():
    with pytest.raises(AssertionError, match="17 tokens does not fit 16"):
        pack(sequences_of([17]), MAX_LENGTH)


def test_many_examples_leave_hardly_any_room():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, MAX_LENGTH, 20_000)
    ids, mask, ones = np.arange(MAX_LENGTH, dtype=np.int32), np.zeros(MAX_LENGTH, bool), np.ones(MAX_LENGTH, np.int32)
    packed = pack([Sequence(ids[:n], mask[:n], ones[:n]) for n in lengths], MAX_LENGTH)
    assert sum(map(len, packed)) == lengths.sum()
    assert len(packed) <= 1.01 * lengths.sum() / MAX_LENGTH + 1
