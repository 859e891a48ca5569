"""The bound on what sites weigh: laws of water filling, against a plain solution by bisection."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedllm.config import RunConfig
from fedllm.messages import MAX_COUNT
from strategies.weights import bounded, cut, heeds_weights

CLAIMS = st.lists(st.integers(1, MAX_COUNT) | st.integers(1, 1000), min_size=1, max_size=12).map(
    lambda values: {f"site-{index:02}": float(value) for index, value in enumerate(values)}
)
CAPS = st.floats(0.01, 1.0)


def shares(weights: dict[str, float]) -> dict[str, float]:
    whole = math.fsum(weights.values())
    return {site: weight / whole for site, weight in weights.items()}


@settings(deadline=None)
@given(CLAIMS, CAPS)
def test_shares_sum_to_one_none_exceeds_the_bound_and_order_is_kept(claims: dict[str, float], cap: float) -> None:
    weights = bounded(claims, cap)
    found = shares(weights)
    assert weights.keys() == claims.keys()
    assert all(weight > 0 and math.isfinite(weight) for weight in weights.values())
    assert math.fsum(found.values()) == pytest.approx(1)
    if len(claims) >= 3:
        assert max(found.values()) <= max(cap, 1 / len(claims)) * (1 + 1e-9)
    falling = sorted(claims, key=lambda site: -claims[site])
    assert all(weights[first] >= weights[second] for first, second in pairwise(falling))


@settings(deadline=None)
@given(CLAIMS, CAPS)
def test_whoever_is_not_cut_keeps_its_claim_bit_for_bit_and_so_do_all_where_nobody_exceeds(
    claims: dict[str, float], cap: float
) -> None:
    weights = bounded(claims, cap)
    if max(shares(claims).values()) <= cap or len(claims) < 3:
        assert weights == claims
        assert cut(claims, weights) == ()
    assume(cap * len(claims) > 1)
    at_bound = {site for site, share in shares(weights).items() if share > cap * (1 - 1e-6)}
    assert all(weights[site] == claims[site] for site in claims.keys() - at_bound)


@settings(deadline=None)
@given(CLAIMS, CAPS)
def test_the_weights_are_those_that_bisection_finds(claims: dict[str, float], cap: float) -> None:
    """The level L with ``min(w, L)`` summing to ``L / cap``, searched for and not solved."""
    assume(len(claims) >= 3)
    assume(cap * len(claims) > 1 + 1e-6)
    low, high = 0.0, max(claims.values())
    for _ in range(200):
        level = (low + high) / 2
        if cap * math.fsum(min(claim, level) for claim in claims.values()) >= level:
            low = level
        else:
            high = level
    weights = bounded(claims, cap)
    for site, claim in claims.items():
        assert weights[site] == pytest.approx(min(claim, high), rel=1e-6)


@settings(deadline=None)
@given(CLAIMS, CAPS, st.randoms())
def test_names_and_their_order_do_not_matter(claims: dict[str, float], cap: float, random: object) -> None:
    rows = list(claims.items())
    random.shuffle(rows)  # type: ignore[attr-defined]
    assert bounded(dict(rows), cap) == bounded(claims, cap)


def test_a_site_that_claims_a_billion_counts_as_much_as_all_others_together() -> None:
    claims = {"a": 10.0, "b": 20.0, "c": 30.0, "liar": 1e9}
    weights = bounded(claims, 0.5)
    assert weights == {"a": 10.0, "b": 20.0, "c": 30.0, "liar": 60.0}
    [one] = cut(claims, weights)
    assert (one.site, one.counted) == ("liar", 0.5)
    assert one.claimed == pytest.approx(1, abs=1e-6)


def test_two_liars_cannot_outweigh_the_rest_where_the_bound_is_a_fifth() -> None:
    claims = {"a": 1.0, "b": 1.0, "c": 1.0, "liar": 1e9, "other liar": 1e12}
    assert shares(bounded({**claims, "d": 1.0}, 0.2)) == pytest.approx(
        {"a": 0.15, "b": 0.15, "c": 0.15, "d": 0.15, "liar": 0.2, "other liar": 0.2}
    )
    assert shares(bounded(claims, 0.2)) == pytest.approx(dict.fromkeys(claims, 0.2))


def test_of_two_sites_none_is_cut_and_an_impossible_bound_makes_all_alike() -> None:
    assert bounded({"a": 1.0, "b": 9.0}, 0.5) == {"a": 1.0, "b": 9.0}
    assert bounded({"a": 1.0, "b": 9.0, "c": 3.0}, 0.1) == {"a": 1.0, "b": 1.0, "c": 1.0}


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({}, True),
        ({"aggregator": "krum"}, False),
        ({"aggregator": "geometric-median"}, True),
        ({"name": "hetlora"}, False),
    ],
)
def test_rules_without_weights_are_known(section: dict[str, str], expected: bool) -> None:
    assert heeds_weights(RunConfig.model_validate({"strategy": section})) == expected
