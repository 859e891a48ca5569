"""Robust rules against plain float64 pseudocode on whole matrices of updates.

Shape legend: K updates, D coordinates.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.errors import UpdateError
from fedllm.update import Arrays, Layout, TensorSpec
from strategies.robust.products import Products
from strategies.robust.space import norms, scales_to, squared_distances
from strategies.slots import ArraySource
from tests.robust_tools import LAYOUT, RULES, SITE_RULES, Matrix, aggregate, draw_rows, draw_state, to_arrays, to_row

COHORTS = st.tuples(st.integers(0, 1000), st.integers(1, 9))


def plain_median(rows: Matrix) -> Matrix:
    return np.median(rows, axis=0)


def plain_trimmed_mean(rows: Matrix, cut: int) -> Matrix:
    return np.sort(rows, axis=0)[cut : len(rows) - cut].mean(axis=0)


def plain_krum(rows: Matrix, liars: int, multi: bool) -> Matrix:
    num_near = max(1, len(rows) - liars - 2)
    scores = []
    for row in rows:
        squares = sorted(float(np.sum((row - other) ** 2)) for other in rows)
        scores.append(sum(squares[1 : 1 + num_near]))
    order = sorted(range(len(rows)), key=scores.__getitem__)
    return rows[order[: num_near if multi else 1]].mean(axis=0)


def plain_geometric_median(rows: Matrix, weights: Matrix, iterations: int = 8) -> Matrix:
    shares = weights / weights.sum()
    middle = shares @ rows
    objective = shares @ np.linalg.norm(rows - middle, axis=1)
    for _ in range(iterations):
        pulls = shares / np.maximum(1e-6, np.linalg.norm(rows - middle, axis=1))
        middle = pulls @ rows / pulls.sum()
        following = shares @ np.linalg.norm(rows - middle, axis=1)
        if objective - following <= 1e-6 * objective:
            break
        objective = following
    return middle


def plain_fltrust(rows: Matrix, trusted: int) -> Matrix:
    lengths = np.linalg.norm(rows, axis=1)
    trust = np.maximum(0, rows @ rows[trusted] / lengths / lengths[trusted])
    return (trust * lengths[trusted] / lengths) @ rows / trust.sum()


def plain_norm_bound(rows: Matrix, weights: Matrix, bound: float | None) -> Matrix:
    lengths = np.linalg.norm(rows, axis=1)
    limit = np.median(lengths) if bound is None else bound
    return (weights * np.minimum(1, limit / lengths)) @ rows / weights.sum()


def assert_near(found: Matrix, expected: Matrix) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7 * np.abs(expected).max())


@settings(max_examples=30, deadline=None)
@given(COHORTS)
def test_the_median_is_numpys(cohort: tuple[int, int]) -> None:
    rows = draw_rows(*cohort)
    assert_near(aggregate(rows, {"strategy.aggregator": "median"})[0], plain_median(rows))


@settings(max_examples=30, deadline=None)
@given(COHORTS, st.sampled_from([0.0, 0.1, 0.25, 0.4, 0.49]))
def test_the_trimmed_mean_leaves_out_the_extremes(cohort: tuple[int, int], fraction: float) -> None:
    rows = draw_rows(*cohort)
    found, measured = aggregate(rows, {"strategy.aggregator": "trimmed-mean", "strategy.trim_fraction": fraction})
    cut = int(fraction * len(rows))
    assert_near(found, plain_trimmed_mean(rows, cut))
    assert (measured["values_trimmed"], measured["values_kept"]) == (2 * cut, len(rows) - 2 * cut)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 3), st.integers(0, 4), st.booleans())
def test_krum_takes_the_most_central_updates(seed: int, liars: int, more: int, multi: bool) -> None:
    count = 2 * liars + 3 + more
    rows = draw_rows(seed, count)
    name = "multi-krum" if multi else "krum"
    found, measured = aggregate(rows, {"strategy.aggregator": name, "strategy.byzantine_sites": liars})
    if count == 3:  # each of the two nearest is the other's only neighbour, so their scores are equal
        assert any(np.allclose(found, row) for row in rows)
    else:
        assert_near(found, plain_krum(rows, liars, multi))
    used = count - liars - 2 if multi else 1
    assert (measured["sites_used"], measured["sites_ignored"]) == (used, count - used)
    shares = [measured[f"share/site-{number:02}"] for number in range(count)]
    assert sorted(set(shares) - {0.0}) == pytest.approx([1 / used])


@settings(max_examples=30, deadline=None)
@given(COHORTS, st.data())
def test_the_geometric_median_is_weiszfelds(cohort: tuple[int, int], data: st.DataObject) -> None:
    rows = draw_rows(*cohort)
    weights = data.draw(st.lists(st.integers(1, 1000), min_size=len(rows), max_size=len(rows)))
    chosen = {"strategy.aggregator": "geometric-median"}
    found, measured = aggregate(rows, chosen, weights=list(map(float, weights)))
    assert_near(found, plain_geometric_median(rows, np.array(weights, float)))
    assert 1 <= measured["iterations"] <= 8


def test_the_geometric_median_nearly_minimises_the_sum_of_distances() -> None:
    rows = draw_rows(3, 7)
    rows[-1] += 50
    found, measured = aggregate(rows, {"strategy.aggregator": "geometric-median"})
    best = plain_geometric_median(rows, np.ones(7), iterations=1000)
    assert np.linalg.norm(rows - found, axis=1).sum() < 1.001 * np.linalg.norm(rows - best, axis=1).sum()
    assert measured["share/site-06"] < 0.05 < measured["share/site-00"]


@settings(max_examples=30, deadline=None)
@given(COHORTS)
def test_fltrust_weighs_by_the_cosine_to_the_trusted_site(cohort: tuple[int, int]) -> None:
    rows = draw_rows(*cohort)
    trusted = len(rows) // 2
    chosen = {"strategy.aggregator": "fltrust", "strategy.trusted_site": f"site-{trusted:02}"}
    found, measured = aggregate(rows, chosen)
    assert_near(found, plain_fltrust(rows, trusted))
    assert measured["norm_trusted"] == pytest.approx(np.linalg.norm(rows[trusted]))


def test_fltrust_ignores_a_site_that_points_away() -> None:
    rows = draw_rows(1, 4)
    rows[2] *= -3
    chosen = {"strategy.aggregator": "fltrust", "strategy.trusted_site": "site-00"}
    _, measured = aggregate(rows, chosen)
    assert measured["share/site-02"] == 0.0
    assert measured["sites_ignored"] == 1


def test_fltrust_without_the_trusted_sites_update_cannot_aggregate() -> None:
    chosen = {"strategy.aggregator": "fltrust", "strategy.trusted_site": "clinic"}
    with pytest.raises(UpdateError, match=r"trusted site is missing; expected clinic; found site-00, site-01"):
        aggregate(draw_rows(0, 2), chosen)


@settings(max_examples=30, deadline=None)
@given(COHORTS, st.one_of(st.just("median"), st.floats(0.1, 30.0)), st.data())
def test_a_norm_bound_shrinks_what_is_larger(cohort: tuple[int, int], bound: str | float, data: st.DataObject) -> None:
    rows = draw_rows(*cohort)
    weights = data.draw(st.lists(st.integers(1, 1000), min_size=len(rows), max_size=len(rows)))
    found, measured = aggregate(rows, {"strategy.norm_bound": bound}, weights=list(map(float, weights)))
    limit = None if bound == "median" else float(bound)
    assert_near(found, plain_norm_bound(rows, np.array(weights, float), limit))
    lengths = np.linalg.norm(rows, axis=1)
    clearly, perhaps = ((lengths > measured["norm_bound"] * (1 + slack)).sum() for slack in (1e-9, -1e-9))
    assert clearly <= measured["sites_scaled"] <= perhaps
    assert (measured["norm_min"], measured["norm_max"]) == pytest.approx((lengths.min(), lengths.max()))


def product_rows(rows: Matrix, received: Arrays, layout: Layout, scale: float = 2.0) -> Matrix:
    """Return the updates [K, D'] as dense changes of every layer's product, with other tensors as they are."""
    flat = []
    for row in rows:
        delta, parts = to_arrays(row, layout), []
        for spec in layout.tensors:
            left = spec.name.replace("lora_A", "lora_B")
            if spec.role == "lora_A":
                before = received[left].astype(float) @ received[spec.name].astype(float)
                after = (received[left].astype(float) + delta[left]) @ (
                    received[spec.name].astype(float) + delta[spec.name]
                )
                parts.append(scale * (after - before).ravel())
            elif spec.role != "lora_B":
                parts.append(delta[spec.name].astype(float).ravel())
        flat.append(np.concatenate(parts))
    return np.array(flat)


ALPHA = {"adapter.alpha": 6.0, "adapter.rank": 3}
"""Settings with the scale 2 that :func:`product_rows` takes."""


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 6))
def test_distances_of_products_are_those_of_dense_matrices(seed: int, count: int) -> None:
    rows, received = draw_rows(seed, count), draw_state(seed)
    space = Products(LAYOUT, received, [ArraySource(to_arrays(row, LAYOUT)) for row in rows], lambda rank: 6.0 / rank)
    dense = product_rows(rows, received, LAYOUT)
    gaps = dense[:, None] - dense[None]
    np.testing.assert_allclose(squared_distances(space), np.sum(gaps**2, axis=2), rtol=1e-12, atol=1e-18)
    np.testing.assert_allclose(norms(space.growth()), np.linalg.norm(dense, axis=1), rtol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 100.0))
def test_a_scaled_update_has_the_wanted_product_norm(seed: int, norm: float) -> None:
    rows, received = draw_rows(seed, 3), draw_state(seed)
    space = Products(LAYOUT, received, [ArraySource(to_arrays(row, LAYOUT)) for row in rows], lambda rank: 6.0 / rank)
    scales = scales_to(space.growth(), norm)
    for row, scale in zip(rows, scales, strict=True):
        delta = {name: scale * value.astype(float) for name, value in to_arrays(row, LAYOUT).items()}
        flat = np.concatenate([value.ravel() for value in delta.values()])
        # to_arrays rounds to float32, so the dense oracle is taken on what is left of the scaled delta
        found = np.linalg.norm(product_rows(flat[None], received, LAYOUT))
        assert found == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("rule", SITE_RULES)
def test_a_rule_on_products_gives_the_shares_of_the_rule_on_dense_products(rule: str) -> None:
    """The dense products of all layers, as one tensor, take the place of the factors."""
    received, rows = draw_state(5), draw_rows(5, 7, scale=0.3)
    rows[-1] *= 4
    dense = product_rows(rows, received, LAYOUT)
    flat = Layout((TensorSpec("products", (dense.shape[1],)),))
    chosen = {
        "strategy.aggregator": "mean" if rule == "norm bound" else rule,
        "strategy.norm_bound": "median" if rule == "norm bound" else 0.0,
        "strategy.byzantine_sites": 1,
        "strategy.trusted_site": "site-03",
        **ALPHA,
    }
    _, expected = aggregate(dense, chosen, layout=flat)
    _, found = aggregate(rows, {**chosen, "strategy.robust_on": "products"}, received=received)
    shared = set(expected) & set(found) - {"delta_norm", "scale_min"}
    assert len(shared) >= 5
    for name in shared:
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name


def turned(row: Matrix, received: Arrays, seed: int) -> Matrix:
    """Return an update that leads to the same products as another, with the factors of every layer turned by T, T^-1."""
    draw = np.random.default_rng(seed)
    delta = to_arrays(row, LAYOUT)
    for spec in LAYOUT.tensors:
        left = spec.name.replace("lora_A", "lora_B")
        if spec.role == "lora_A":
            turn = np.linalg.qr(draw.standard_normal((3, 3)))[0]
            b, a = received[left] + delta[left].astype(float), received[spec.name] + delta[spec.name].astype(float)
            delta[left] = (b @ turn - received[left]).astype(np.float32)
            delta[spec.name] = (turn.T @ a - received[spec.name]).astype(np.float32)
    return np.concatenate([delta[name].ravel() for name in LAYOUT.names])


def test_krum_on_products_sees_that_turned_factors_say_the_same() -> None:
    received, rows = draw_state(2), draw_rows(2, 1).repeat(5, axis=0)
    rows += 0.01 * draw_rows(3, 5)
    rows[4] += 0.5 * draw_rows(4, 1)[0]  # says something else, in the honest sites' gauge
    rows = np.array([turned(row, received, seed) if seed < 3 else row for seed, row in enumerate(rows)])
    chosen = {"strategy.aggregator": "multi-krum", "strategy.byzantine_sites": 1, **ALPHA}
    _, on_factors = aggregate(rows, chosen, received=received)
    _, on_products = aggregate(rows, {**chosen, "strategy.robust_on": "products"}, received=received)
    assert on_products["share/site-04"] == 0.0
    assert on_factors["share/site-04"] > 0.0, "on factors the one that says something else looks central"
    assert on_products["norm_max"] > 0


@pytest.mark.parametrize("rule", ["norm bound", "geometric-median", "fltrust"])
def test_a_harmless_product_can_carry_a_harmful_factor(rule: str) -> None:
    """Why rules that mix sites are refused on products where factors are averaged: B is zero, and one A is enormous."""
    received, rows = draw_state(6), 0.1 * draw_rows(6, 5)
    received = {name: value * np.float32("lora_B" not in name) for name, value in received.items()}
    liar = to_arrays(rows[4], LAYOUT)
    for spec in LAYOUT.tensors:
        liar[spec.name] *= np.float32({"lora_A": 1e6, "lora_B": 1e-6}.get(spec.role, 1.0))
    rows[4] = to_row(liar, LAYOUT)
    chosen = {**RULES[rule], "strategy.byzantine_sites": 0, **ALPHA}
    on_factors, _ = aggregate(rows, chosen, received=received)
    on_products, _ = aggregate(rows, {**chosen, "strategy.robust_on": "products"}, received=received)
    assert np.linalg.norm(on_products) > 1000 * np.linalg.norm(on_factors)


def test_where_one_factor_travels_products_are_taken_with_the_received_partner() -> None:
    rows, received = draw_rows(8, 4), draw_state(8)
    only_b = Layout(tuple(spec for spec in LAYOUT.tensors if spec.role == "lora_B"))
    updates = [ArraySource(to_arrays(row, LAYOUT)) for row in rows]
    space = Products(only_b, received, updates, lambda _: 2.0)
    still = np.array(
        [
            np.concatenate(
                [
                    (0 if spec.role == "lora_A" else 1) * to_arrays(row, LAYOUT)[spec.name].ravel()
                    for spec in LAYOUT.tensors
                ]
            )
            for row in rows
        ]
    )
    dense = product_rows(still, received, LAYOUT)[:, : -LAYOUT["prompt"].size]
    np.testing.assert_allclose(norms(space.growth()), np.linalg.norm(dense, axis=1), rtol=1e-12)
