"""Rules for products of LoRA factors against the dense float64 oracle, with the figures that the papers' claims predict."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from fedllm import rng
from strategies.lowrank.fair import corrected_left
from strategies.lowrank.product import Matrix, Product, difference, product, total
from strategies.lowrank.refactor import refactor
from strategies.lowrank.spectrum import recompress, spectrum
from tests.dense_oracle import Dense, SiteFactors, drifted_sites, ideal_update, padded, relative_error

MIXED_RANKS = [4, 4, 8, 8, 16, 16, 32, 64]
"""FLoRIST's eight sites."""


def draw(purpose: str) -> np.random.Generator:
    return rng.generator(0, purpose=purpose)


def stacked(sites: Sequence[SiteFactors]) -> Product:
    whole = sum(site.weight for site in sites)
    return total([product(site.b, site.a, site.scale).scaled(site.weight / whole) for site in sites])


def averages(sites: Sequence[SiteFactors]) -> tuple[Matrix, Matrix]:
    """FedAvg's mean factors, padded to the largest rank."""
    rank, whole = max(site.b.shape[1] for site in sites), sum(site.weight for site in sites)
    wide = [padded(site, rank) for site in sites]
    b, a = (np.sum([one.weight / whole * getattr(one, name) for one in wide], axis=0) for name in ("b", "a"))
    return b, a


def fedavg_error(sites: Sequence[SiteFactors]) -> float:
    b, a = averages(sites)
    return relative_error(sites[0].scale * b @ a, ideal_update(sites))


def dense(term: Product) -> Dense:
    return term.left @ term.right


MIXTURES = {
    "equal ranks": [(8, 16.0, False)] * 4,
    "mixed ranks": [(rank, 16.0, False) for rank in MIXED_RANKS],
    "mixed alpha": [(8, alpha, False) for alpha in (4.0, 8.0, 16.0, 64.0)],
    "rank-stabilised": [(rank, 16.0, True) for rank in MIXED_RANKS],
    "a rank above the layer's": [(48, 16.0, False), (3, 1.0, True), (70, 9.0, False)],
}


def mixture(name: str) -> list[SiteFactors]:
    source = draw(name)
    rows = MIXTURES[name]
    return [
        SiteFactors(
            float(source.integers(1, 100)),
            alpha / (np.sqrt(rank) if stabilised else rank),
            source.standard_normal((40, rank)),
            source.standard_normal((rank, 56)),
        )
        for rank, alpha, stabilised in rows
    ]


@pytest.mark.parametrize("name", MIXTURES)
def test_stacking_is_the_ideal_update(name: str) -> None:
    sites = mixture(name)
    assert relative_error(dense(stacked(sites)), ideal_update(sites)) < 1e-14


@pytest.mark.parametrize("name", MIXTURES)
def test_the_core_decomposition_is_the_dense_one(name: str) -> None:
    sites = mixture(name)
    found, expected = spectrum(stacked(sites)), np.linalg.svd(ideal_update(sites), compute_uv=False)
    np.testing.assert_allclose(found.values, expected[: found.rank], rtol=1e-12, atol=1e-12 * expected[0])
    assert expected[found.rank :].sum() < 1e-12 * expected[0]
    assert relative_error(dense(found.part(0, found.rank)), ideal_update(sites)) < 1e-13
    np.testing.assert_allclose(found.left.T @ found.left, np.eye(found.rank), atol=1e-13)
    np.testing.assert_allclose(found.right @ found.right.T, np.eye(found.rank), atol=1e-13)


@pytest.mark.parametrize("name", MIXTURES)
def test_averages_and_their_residual_are_the_ideal_update(name: str) -> None:
    """FedEx-LoRA, with factors rounded to float32 as they travel: 1e-6."""
    sites = mixture(name)
    b, a = averages(sites)
    residual = recompress(difference(stacked(sites), product(b, a, 0.7)), 1000).kept
    rounded = [value.astype(np.float32).astype(float) for value in (b, a, residual.left, residual.right)]
    applied = 0.7 * rounded[0] @ rounded[1] + rounded[2] @ rounded[3]
    assert relative_error(0.7 * b @ a + dense(residual), ideal_update(sites)) < 1e-13
    assert relative_error(applied, ideal_update(sites)) < 1e-6


def test_leaving_scales_out_is_a_large_error() -> None:
    """What two public implementations do: the residual without alpha / rank."""
    sites = mixture("mixed ranks")
    careless = [SiteFactors(site.weight, 1.0, site.b, site.a) for site in sites]
    assert relative_error(dense(stacked(careless)), ideal_update(sites)) > 0.3


def test_the_average_of_factors_errs_by_the_product_of_their_drifts() -> None:
    drifts = [0.3, 0.1, 0.03, 0.01]
    errors = [fedavg_error(drifted_sites(draw("joint"), [8] * 4, drift_b=d, drift_a=d)) for d in drifts]
    slope = np.polyfit(np.log(drifts), np.log(errors), 1)[0]
    assert errors[0] > 1e-2
    assert errors[-1] < 1e-4
    assert slope == pytest.approx(2.0, abs=0.1)


def test_the_average_of_factors_is_exact_where_one_of_them_is_shared() -> None:
    assert fedavg_error(drifted_sites(draw("b"), [8] * 4, drift_b=1.0)) < 1e-14
    assert fedavg_error(drifted_sites(draw("a"), [8] * 4, drift_a=1.0)) < 1e-14


@pytest.mark.parametrize("rank", [1, 4, 8, 20])
def test_truncation_errs_by_the_root_of_the_discarded_energy(rank: int) -> None:
    sites = drifted_sites(draw("truncation"), [8] * 4, num_out=64, num_in=96, drift_b=0.3, drift_a=0.3)
    target, whole = ideal_update(sites), spectrum(stacked(sites))
    error = relative_error(dense(whole.part(0, rank)), target)
    u, s, v = np.linalg.svd(target)
    assert error == pytest.approx(np.sqrt(whole.discarded(rank)), rel=1e-9)
    assert error == pytest.approx(relative_error(u[:, :rank] * s[:rank] @ v[:rank], target), rel=1e-9)


@pytest.mark.parametrize("threshold", [0.8, 0.9, 0.99, 0.9999, 1.0])
def test_a_threshold_takes_the_smallest_rank_that_keeps_its_energy(threshold: float) -> None:
    sites = drifted_sites(draw("threshold"), [8] * 4, num_out=64, num_in=96, drift_b=1.0, drift_a=1.0)
    values = np.linalg.svd(ideal_update(sites), compute_uv=False) ** 2
    share = np.cumsum(values) / values.sum()
    found = spectrum(stacked(sites))
    rank = found.rank_for(threshold)
    if threshold == 1.0:
        assert rank == found.rank == 32
    else:
        assert rank == int(np.argmax(share >= threshold)) + 1
    assert relative_error(dense(found.part(0, rank)), ideal_update(sites)) <= np.sqrt(1 - threshold) + 1e-7
    head, tail = found.part(0, rank), found.part(rank, found.rank)
    assert relative_error(dense(total([head, tail])), ideal_update(sites)) < 1e-13


def test_singular_values_on_b_alone_in_place_of_both_halves_is_a_large_error() -> None:
    """What a public implementation of FlexLoRA does: the root on B only."""
    whole = spectrum(stacked(mixture("mixed ranks")))
    wrong = (whole.left * np.sqrt(whole.values)) @ whole.right
    assert relative_error(wrong, ideal_update(mixture("mixed ranks"))) > 0.4


def test_padding_errs_by_forty_percent_where_stacking_errs_by_nothing() -> None:
    """A component that a share f of the sites holds counts f^2 in place of f: a closed form without drift."""
    exact = drifted_sites(draw("pad"), MIXED_RANKS, num_out=2048, num_in=2048)
    share = np.array([np.mean([rank > index for rank in MIXED_RANKS]) for index in range(64)])
    law = np.sqrt(np.sum((share - share**2) ** 2) / np.sum(share**2))
    assert law == pytest.approx(0.403, abs=1e-3)
    assert fedavg_error(exact) == pytest.approx(law, abs=0.01)
    drifted = drifted_sites(draw("pad"), MIXED_RANKS, drift_b=0.3, drift_a=0.3)
    assert 0.38 < fedavg_error(drifted) < 0.48
    assert relative_error(dense(stacked(drifted)), ideal_update(drifted)) < 1e-14


def test_lora_fair_solves_its_least_squares_problem() -> None:
    sites = drifted_sites(draw("fair"), [4] * 5, num_out=20, num_in=30, drift_b=1.0, drift_a=1.0, scale=2.0)
    b, a = averages(sites)
    ridge = 0.3
    design = np.vstack([2.0 * a.T, np.sqrt(ridge) * np.eye(4)])
    wanted = np.vstack([(ideal_update(sites) - 2.0 * b @ a).T, np.zeros((4, 20))])
    step = np.linalg.lstsq(design, wanted, rcond=None)[0].T
    np.testing.assert_allclose(corrected_left(stacked(sites), b, a, 2.0, ridge), b + step, rtol=1e-9)


def test_lora_fair_removes_only_the_error_inside_the_span() -> None:
    """The error falls as the ridge does, and most of it stays: a mild correction, not exact aggregation."""
    sites = drifted_sites(draw("mild"), [8] * 4, drift_b=0.5, drift_a=0.5)
    (b, a), target = averages(sites), ideal_update(sites)
    ridges = [1e9, 1e4, 1e2, 1e-6]
    errors = [relative_error(corrected_left(stacked(sites), b, a, 1.0, ridge) @ a, target) for ridge in ridges]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(fedavg_error(sites), rel=1e-6)
    outside = (target - b @ a) @ (np.eye(256) - np.linalg.pinv(a) @ a)
    assert errors[-1] == pytest.approx(np.linalg.norm(outside) / np.linalg.norm(target), rel=1e-6)
    assert errors[-1] > 0.8 * errors[0]


def random_turn(source: np.random.Generator, rank: int) -> Matrix:
    turn: Matrix = np.linalg.qr(source.standard_normal((rank, rank)))[0]
    return turn


def test_random_gauges_break_averages_and_not_products() -> None:
    """`B A = (B Q)(Q^T A)`: the mean of factors depends on what means nothing."""
    source = draw("gauge")
    [site] = drifted_sites(source, [8], num_out=64, num_in=96)
    turns = [random_turn(source, 8) for _ in range(6)]
    sites = [SiteFactors(1.0, 1.0, site.b @ turn, turn.T @ site.a) for turn in turns]
    assert fedavg_error(sites) > 0.6
    assert relative_error(dense(stacked(sites)), site.b @ site.a) < 1e-14


def test_re_factoring_keeps_the_product_and_the_span_and_makes_a_orthonormal() -> None:
    source = draw("fedsvd")
    first = source.standard_normal((6, 40))
    b, a = np.zeros((30, 6)), first
    for round_ in range(20):
        trained = b + source.standard_normal(b.shape)
        b, a_next = refactor(Product(trained, a), 6)
        assert relative_error(b @ a_next, trained @ a) < 1e-12, round_
        a = a_next
        np.testing.assert_allclose(a @ a.T, np.eye(6), atol=1e-12)
        outside = a - a @ np.linalg.pinv(first) @ first
        assert np.linalg.norm(outside) < 1e-10, "the span of A never grows"


def test_re_factoring_a_product_of_smaller_rank_keeps_what_a_spans() -> None:
    a = draw("empty").standard_normal((6, 40))
    b, rows = refactor(Product(np.zeros((30, 6)), a), 6)
    assert not b.any()
    np.testing.assert_allclose(rows @ rows.T, np.eye(6), atol=1e-12)
    np.testing.assert_allclose(rows @ np.linalg.pinv(a) @ a, rows, atol=1e-12)
