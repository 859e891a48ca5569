"""Whom each sampler asks, how often, and that equal draws are equal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.config import read_run_config
from strategies.samplers import PoissonSampler, ShareSampler, build_sampler
from tests.fake_federation import InProcessGrid
from tests.unit.test_loop import events, run, sites

SIZES = {f"s{index}": 10 * (index + 1) for index in range(6)}
NAMES = ("uniform", "weighted", "poisson", "all")


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None)
@given(
    num_sites=st.integers(1, 30), fraction=st.floats(0.01, 1.0), round_=st.integers(1, 99), attempt=st.integers(1, 3)
)
def test_a_choice_is_of_joined_sites_and_repeatable(
    name: str, num_sites: int, fraction: float, round_: int, attempt: int
) -> None:
    sampler = build_sampler(read_run_config({"rounds.sampler": name, "rounds.fraction": fraction}))
    joined = {f"s{index}": index for index in range(num_sites)}
    chosen = sampler.select(joined, round_, attempt)
    assert set(chosen) <= set(joined)
    assert list(chosen) == sorted(set(chosen))
    assert sampler.select(dict(reversed(joined.items())), round_, attempt) == chosen
    assert name == "poisson" or len(chosen) >= sampler.num_wanted(num_sites) > 0


def test_all_takes_everyone_whatever_the_fraction() -> None:
    sampler = build_sampler(read_run_config({"rounds.sampler": "all", "rounds.fraction": 0.1}))
    assert sampler.select(SIZES, 3, 1) == tuple(SIZES)


def test_a_poisson_sample_takes_each_site_for_itself() -> None:
    """Counts over many rounds are binomial, pairs are independent, and who else has joined changes no draw."""
    sampler, num_rounds = PoissonSampler(5, 0.3), 2000
    taken = np.array([[site in sampler.select(SIZES, round_, 1) for site in SIZES] for round_ in range(num_rounds)])
    deviation = np.sqrt(num_rounds * 0.3 * 0.7)
    assert np.all(np.abs(taken.sum(axis=0) - 0.3 * num_rounds) < 4 * deviation)
    correlation = np.corrcoef(taken.T) - np.eye(len(SIZES))
    assert np.abs(correlation).max() < 4 / np.sqrt(num_rounds)
    assert {len(row) for row in (np.flatnonzero(row) for row in taken)} >= {0, 1, 2, 3}
    alone = [sampler.select({"s2": 1}, round_, 1) == ("s2",) for round_ in range(num_rounds)]
    np.testing.assert_array_equal(alone, taken[:, 2])


def test_a_weighted_sample_takes_large_sites_more_often() -> None:
    """A single draw takes a site with its share of the examples."""
    sampler, num_rounds = ShareSampler(5, 0.01, 1, 1.0, is_weighted=True), 3000
    chosen = [sampler.select(SIZES, round_, 1) for round_ in range(num_rounds)]
    total = sum(SIZES.values())
    for site, size in SIZES.items():
        expected = size / total
        found = sum(site in names for names in chosen) / num_rounds
        assert abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / num_rounds)


def test_a_poisson_round_below_the_quorum_is_drawn_again(tmp_path: Path) -> None:
    changes = {"rounds.sampler": "poisson", "rounds.fraction": 0.5, "rounds.max_attempts": 20, "num_rounds": 6}
    folder = run(tmp_path, InProcessGrid(sites()), **changes)
    asked = [len(event["asked"]) for event in events(folder, "round")]
    assert len(asked) == 6
    assert all(2 <= number <= 3 for number in asked)
    assert any(len(event["asked"]) < 2 for event in events(folder, "attempt"))
