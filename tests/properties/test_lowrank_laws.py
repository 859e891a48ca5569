"""Laws of factored products: for every shape, rank and content."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm import rng
from strategies.lowrank.product import Product, difference, nothing, product, total
from strategies.lowrank.spectrum import norm_of, recompress, spectrum

SIZES = st.integers(1, 12)
SEEDS = st.integers(0, 10_000)


def drawn(seed: int, num_out: int, num_in: int, rank: int, magnitude: float = 1.0) -> Product:
    draw = rng.generator(seed, purpose="law")
    return product(draw.standard_normal((num_out, rank)), draw.standard_normal((rank, num_in)), magnitude)


def dense(term: Product) -> np.ndarray:
    return term.left @ term.right


@settings(deadline=None)
@given(SEEDS, SIZES, SIZES, st.lists(st.tuples(st.integers(0, 15), st.floats(-5, 5)), min_size=1, max_size=5))
def test_a_sum_of_products_is_the_sum_of_the_matrices_in_any_order(
    seed: int, num_out: int, num_in: int, rows: list[tuple[int, float]]
) -> None:
    terms = [drawn(seed + i, num_out, num_in, rank).scaled(weight) for i, (rank, weight) in enumerate(rows)]
    expected = sum(dense(term) for term in terms)
    size = 1e-13 * (1 + sum(float(np.abs(term.left).max(initial=0)) * 100 for term in terms))
    np.testing.assert_allclose(dense(total(terms)), expected, atol=size)
    np.testing.assert_allclose(dense(total(terms[::-1])), expected, atol=size)


@settings(deadline=None)
@given(SEEDS, SIZES, SIZES, st.integers(0, 15), st.integers(1, 15), st.floats(1e-9, 1e9))
def test_recompression_keeps_what_fits_and_accounts_for_the_rest(
    seed: int, num_out: int, num_in: int, rank: int, bound: int, magnitude: float
) -> None:
    term = drawn(seed, num_out, num_in, rank, magnitude)
    found = recompress(term, bound)
    whole = float(np.sum(dense(term) ** 2))
    lost = float(np.sum((dense(term) - dense(found.kept)) ** 2))
    assert found.kept.rank <= min(bound, num_out, num_in, max(rank, 0))
    np.testing.assert_allclose(found.energy, whole, rtol=1e-10)
    np.testing.assert_allclose(found.discarded_energy, lost, rtol=1e-6, atol=1e-20 * max(whole, 1e-300))
    if bound >= min(num_out, num_in, rank):
        assert found.discarded_energy <= 1e-28 * whole


@settings(deadline=None)
@given(SEEDS, SIZES, SIZES, st.integers(1, 15), st.floats(1e-6, 1e6))
def test_every_measure_of_a_norm_is_the_dense_norm(
    seed: int, num_out: int, num_in: int, rank: int, magnitude: float
) -> None:
    term = drawn(seed, num_out, num_in, rank, magnitude)
    expected = float(np.linalg.norm(dense(term)))
    np.testing.assert_allclose([term.norm, spectrum(term).norm, norm_of(term)], expected, rtol=1e-9)


@settings(deadline=None)
@given(SEEDS, SIZES, SIZES, st.integers(1, 15))
def test_a_product_minus_itself_is_nothing(seed: int, num_out: int, num_in: int, rank: int) -> None:
    term = drawn(seed, num_out, num_in, rank)
    gone = spectrum(difference(term, term))
    assert max(gone.norm, norm_of(difference(term, term))) <= 1e-13 * (1 + term.norm)
    assert spectrum(nothing((num_out, num_in))).rank == 0


@settings(deadline=None)
@given(SEEDS, SIZES, SIZES, st.integers(1, 15), st.floats(0.01, 1.0))
def test_a_threshold_is_met_by_its_rank_and_not_by_one_less(
    seed: int, num_out: int, num_in: int, rank: int, threshold: float
) -> None:
    whole = spectrum(drawn(seed, num_out, num_in, rank))
    found = whole.rank_for(threshold)
    assert 1 <= found <= whole.rank
    assert 1 - whole.discarded(found) >= threshold - 1e-12
    if found > 1:
        assert 1 - whole.discarded(found - 1) < threshold


@settings(deadline=None)
@given(SEEDS, SIZES, SIZES, st.integers(0, 15))
def test_equal_products_decompose_to_equal_bits(seed: int, num_out: int, num_in: int, rank: int) -> None:
    one, two = spectrum(drawn(seed, num_out, num_in, rank)), spectrum(drawn(seed, num_out, num_in, rank))
    np.testing.assert_array_equal(one.left, two.left)
    np.testing.assert_array_equal(one.right, two.right)
    assert (one.right.max(axis=1, initial=0) >= -one.right.min(axis=1, initial=0)).all(), "the sign is settled"
