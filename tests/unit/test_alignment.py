"""FedRot's alignment: products stay, factors meet, and a federation of one product in many gauges averages to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedllm import rng
from fedllm.lora.alignment import aligned, rotation
from fedllm.update import Arrays
from tests.fake_federation import InProcessGrid, LocalSite
from tests.unit.test_loop import params, run

A, B = "m.layers.0.q_proj.lora_A.weight", "m.layers.0.q_proj.lora_B.weight"
Matrix = NDArray[np.float64]


def factors(seed: int, rank: int = 8) -> dict[str, Matrix]:
    draw = rng.generator(seed, purpose="factors")
    return {A: draw.standard_normal((rank, 96)), B: draw.standard_normal((64, rank))}


def turn(seed: int, rank: int = 8, *, proper: bool) -> Matrix:
    found: Matrix = np.linalg.qr(rng.generator(seed, purpose="turn").standard_normal((rank, rank)))[0]
    if proper and np.linalg.det(found) < 0:
        found[:, 0] *= -1
    return found


def turned(site: dict[str, Matrix], by: Matrix) -> dict[str, Matrix]:
    return {A: by.T @ site[A], B: site[B] @ by}


def arrays(site: dict[str, Matrix]) -> Arrays:
    return {name: value.astype(np.float32) for name, value in site.items()}


def error_of_the_mean(sites: Sequence[Mapping[str, NDArray[np.floating]]], target: Matrix) -> float:
    b, a = (np.mean([site[name].astype(np.float64) for site in sites], axis=0) for name in (B, A))
    return float(np.linalg.norm(b @ a - target) / np.linalg.norm(target))


@settings(deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.3, 0.5, 1.0]), st.integers(1, 9))
def test_every_product_stays_as_it_was(seed: int, strength: float, round_: int) -> None:
    site, reference = arrays(factors(seed)), arrays(factors(seed + 1))
    found = aligned(site, reference, strength, round_)
    before, after = (one[B].astype(np.float64) @ one[A].astype(np.float64) for one in (site, found))
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())
    if round_ == 1:
        assert found is site


@settings(deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.2, 0.5, 0.9, 1.0]))
def test_a_turn_is_orthogonal_and_a_partial_one_a_rotation(seed: int, strength: float) -> None:
    found = rotation(rng.generator(seed).standard_normal((6, 6)), strength)
    np.testing.assert_allclose(found @ found.T, np.eye(6), atol=1e-12)
    if strength < 1:
        assert np.linalg.det(found) == pytest.approx(1.0)


@pytest.mark.parametrize("round_", [2, 3])
def test_the_whole_turn_is_the_best_one(round_: int) -> None:
    """No other orthogonal matrix brings the reference factor nearer (Procrustes), checked against many."""
    site, reference = factors(1), factors(2)
    name = A if round_ % 2 == 0 else B
    found = aligned(arrays(site), arrays(reference), 1.0, round_)
    best = np.linalg.norm(found[name] - reference[name])
    for seed in range(200):
        other = turned(site, turn(seed, proper=False))
        assert np.linalg.norm(other[name] - reference[name]) > best


def test_in_float64_a_whole_turn_leaves_no_error_at_all() -> None:
    common = factors(7)
    sites = [turned(common, turn(seed, proper=False)) for seed in range(6)]
    back = [turned(site, rotation(site[A] @ common[A].T, 1.0)) for site in sites]
    assert error_of_the_mean(back, common[B] @ common[A]) < 1e-14


@pytest.mark.parametrize("round_", [2, 3])
def test_one_product_in_many_gauges_is_averaged_to_itself(round_: int) -> None:
    """Six sites of rank 8: the mean of the factors is wrong by four fifths; half a turn leaves about three fifths of the
    product wrong, a whole one nothing.
    """
    common = factors(7)
    target = common[B] @ common[A]
    sites = [arrays(turned(common, turn(seed, proper=True))) for seed in range(6)]
    assert 0.75 < error_of_the_mean(sites, target) < 0.9
    errors = {
        strength: error_of_the_mean([aligned(site, arrays(common), strength, round_) for site in sites], target)
        for strength in (1.0, 0.5)
    }
    assert errors[1.0] < 1e-6
    assert 0.45 < errors[0.5] < 0.7


@pytest.mark.parametrize(
    ("reference", "least", "most"), [("none's", 0.53, 0.63), ("one's", 0.38, 0.46), ("mean", 0.31, 0.39)]
)
def test_how_much_half_a_turn_leaves_depends_on_whose_gauge_the_reference_has(
    reference: str, least: float, most: float
) -> None:
    """Means over twelve draws of six sites, rank 8: the reference in a gauge that no site has, in that of one of them, and
    the mean of what they have, which is what a federation turns to after a round of plain averaging.
    """
    errors = []
    for draw in range(12):
        common = factors(draw)
        sites = [turned(common, turn(100 * draw + one, proper=True)) for one in range(6)]
        mean = {name: np.mean([site[name] for site in sites], axis=0) for name in (A, B)}
        towards = arrays({"none's": common, "one's": sites[0], "mean": mean}[reference])
        found = [aligned(arrays(site), towards, 0.5, 2) for site in sites]
        errors.append(error_of_the_mean(found, common[B] @ common[A]))
    assert least < np.mean(errors) < most


def test_the_federation_runs_with_aligned_factors(tmp_path: Path) -> None:
    """Through the real loop: the first round is FedAvg's, the second is not."""
    found = {}
    for strategy in ("fedavg", "fedrot"):
        for num_rounds in (1, 2):
            home = tmp_path / f"{strategy}{num_rounds}"
            members = {100 + i: LocalSite(f"site-{i}", i, home / f"site-{i}") for i in range(3)}
            folder = run(home, InProcessGrid(dict(members)), num_rounds=num_rounds, **{"strategy.name": strategy})
            found[strategy, num_rounds] = params(folder)
    for name, value in found["fedavg", 1].items():
        np.testing.assert_array_equal(found["fedrot", 1][name], value)
    assert any(not np.array_equal(found["fedrot", 2][name], value) for name, value in found["fedavg", 2].items())
