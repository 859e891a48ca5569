"""Hold-out: stable, disjoint, never empty, within its bounds."""

from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fedllm.data.examples import Example
from fedllm.data.split import Split, split
from fedllm.errors import DataError

texts = st.lists(st.text("abcdef", min_size=1, max_size=3), min_size=2, max_size=60)
fractions = st.floats(0.01, 0.99)
seeds = st.integers(0, 5)


def examples_of(texts):
    return [Example(text=text) for text in texts]


def sides(texts, positions):
    return {texts[i] for i in positions}


@given(texts, fractions, seeds)
def test_the_sides_are_disjoint_in_text_complete_and_never_empty(texts, fraction, seed):
    assume(len(set(texts)) > 1)
    parts = split(examples_of(texts), fraction, seed)
    assert sorted(parts.train + parts.holdout) == list(range(len(texts)))
    assert parts.train
    assert parts.holdout
    assert not sides(texts, parts.train) & sides(texts, parts.holdout)


@given(texts, fractions, seeds)
def test_the_held_out_share_is_the_nearest_that_whole_texts_allow(texts, fraction, seed):
    copies = Counter(texts)
    assume(len(copies) > 1)
    parts = split(examples_of(texts), fraction, seed)
    missed = abs(len(parts.holdout) - fraction * len(texts))
    at_a_limit = 1 in (len(sides(texts, parts.holdout)), len(sides(texts, parts.train)))
    assert missed <= max(copies.values()) / 2 or at_a_limit


@given(st.sets(st.text("abcdef", min_size=1), min_size=2, max_size=40), fractions, seeds, st.randoms())
def test_the_order_of_the_examples_does_not_matter(texts, fraction, seed, random):
    ordered, shuffled = sorted(texts), random.sample(sorted(texts), len(texts))
    one, other = split(examples_of(ordered), fraction, seed), split(examples_of(shuffled), fraction, seed)
    assert sides(ordered, one.holdout) == sides(shuffled, other.holdout)


@given(
    st.sets(st.text("abcdef", min_size=1), min_size=2, max_size=30),
    st.sets(st.text("uvwxyz", min_size=1), max_size=30),
    fractions,
    seeds,
)
def test_adding_examples_moves_the_border_and_reshuffles_nothing(old, new, fraction, seed):
    before, after = sorted(old), sorted(old) + sorted(new)
    one, other = split(examples_of(before), fraction, seed), split(examples_of(after), fraction, seed)
    held_before, held_after = sides(before, one.holdout), sides(after, other.holdout) & old
    assert held_before <= held_after or held_after <= held_before


@given(texts, fractions, seeds, st.integers(0, 10), st.integers(0, 10))
def test_bounds_leave_examples_unused_and_move_nothing(texts, fraction, seed, max_train, max_holdout):
    assume(len(set(texts)) > 1)
    whole = split(examples_of(texts), fraction, seed)
    bounded = split(examples_of(texts), fraction, seed, max_train=max_train, max_holdout=max_holdout)
    for all_of, kept, bound in (
        (whole.train, bounded.train, max_train),
        (whole.holdout, bounded.holdout, max_holdout),
    ):
        assert set(kept) <= set(all_of)
        assert len(kept) == (min(len(all_of), bound) if bound else len(all_of))
        assert len(sides(texts, kept)) == min(len(sides(texts, all_of)), len(kept))
        assert list(kept) == sorted(kept)


def test_seeds_hold_out_different_examples():
    examples = examples_of(map(str, range(200)))
    chosen = {split(examples, 0.2, seed).holdout for seed in range(5)}
    assert len(chosen) == 5


def test_the_same_seed_holds_out_the_same_examples_in_every_release():
    assert split(examples_of("abcdefgh"), 0.25, 42) == Split((0, 1, 2, 3, 5, 7), (4, 6))


@pytest.mark.parametrize("texts", ["", "a", "aaa"])
def test_too_few_different_examples_are_an_error_with_numbers(texts):
    with pytest.raises(DataError, match=rf"at least 2 different.*{len(texts)} examples, {len(set(texts))} different"):
        split(examples_of(texts), 0.5, 0)
