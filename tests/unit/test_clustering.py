"""Groups of sites: planted ones are found, equal sites stay together, and the parts follow their definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedllm import rng
from fedllm.update import Layout, TensorSpec
from strategies.clustering import AlikeByB, best_partition, distances_of, silhouette
from strategies.slots import ArraySource

LAYOUT = Layout(
    tuple(
        TensorSpec(f"m.layers.{n}.q.{role}.weight", shape, role=role)
        for n in range(4)
        for role, shape in (("lora_A", (4, 12)), ("lora_B", (10, 4)))
    )
)


def planted(groups: list[int], noise: float, seed: int = 0) -> dict[str, ArraySource]:
    """Return updates of which those of a group share a direction; sizes differ from site to site."""
    draw = rng.generator(seed, purpose="planted")
    centres = [{spec.name: draw.standard_normal(spec.shape) for spec in LAYOUT.tensors} for _ in range(max(groups) + 1)]
    found = {}
    for index, group in enumerate(groups):
        size = draw.uniform(0.2, 5.0)
        arrays = {
            spec.name: (size * (centres[group][spec.name] + noise * draw.standard_normal(spec.shape))).astype(
                np.float32
            )
            for spec in LAYOUT.tensors
        }
        found[f"site-{index:02d}"] = ArraySource(arrays)
    return found


def clustered(updates: dict[str, ArraySource], max_groups: int = 8) -> dict[str, int]:
    return AlikeByB(1, max_groups).groups(updates, LAYOUT)[0]


def adjusted_rand(one: list[int], two: list[int]) -> float:
    """Hubert and Arabie's index from pair counts."""
    pairs = list(itertools.combinations(range(len(one)), 2))
    same_one, same_two = ([labels[i] == labels[j] for i, j in pairs] for labels in (one, two))
    both = sum(a and b for a, b in zip(same_one, same_two, strict=True))
    expected = sum(same_one) * sum(same_two) / len(pairs)
    limit = (sum(same_one) + sum(same_two)) / 2
    return 1.0 if limit == expected else (both - expected) / (limit - expected)


@pytest.mark.parametrize("noise", [0.3, 1.0])
@pytest.mark.parametrize("groups", [[0, 1] * 4, [0, 0, 0, 1, 1, 2, 2, 2, 2], [3, 2, 1, 0, 3, 2, 1, 0, 3, 1]])
def test_planted_groups_are_recovered(groups: list[int], noise: float) -> None:
    for seed in range(5):
        found = clustered(planted(groups, noise, seed))
        assert adjusted_rand(list(found.values()), groups) == 1.0


def test_the_largest_group_comes_first() -> None:
    found = clustered(planted([0, 1, 1, 2, 1, 2], 0.2))
    assert list(found.values()) == [2, 0, 0, 1, 0, 1]


@pytest.mark.parametrize("count", [2, 3, 6, 12])
def test_sites_without_structure_stay_together(count: int) -> None:
    for seed in range(5):
        assert set(clustered(planted(list(range(count)), 0.5, seed)).values()) == {0}
        assert set(clustered(planted([0] * count, 0.5, seed)).values()) == {0}


def test_no_more_groups_than_allowed_are_made() -> None:
    found = clustered(planted([0, 0, 1, 1, 2, 2, 3, 3], 0.1), 2)
    assert set(found.values()) <= {0, 1}


def test_the_order_of_sites_and_their_sizes_do_not_matter() -> None:
    updates = planted([0, 1, 0, 2, 2, 1], 0.4)
    doubled = {s: ArraySource({n: 2 * v for n, v in u.arrays.items()}) for s, u in reversed(updates.items())}
    assert clustered(doubled) == clustered(updates)


def test_distances_are_means_over_layers_of_one_minus_the_cosine_of_b() -> None:
    updates = list(planted([0, 1, 1], 0.7).values())
    found = distances_of(updates, LAYOUT)
    names = [spec.name for spec in LAYOUT.tensors if spec.role == "lora_B"]
    for i, j in itertools.product(range(3), repeat=2):
        cosines = []
        for name in names:
            one, two = updates[i].arrays[name].ravel(), updates[j].arrays[name].ravel()
            cosines.append(float(one @ two) / float(np.linalg.norm(one) * np.linalg.norm(two)))
        assert found[i, j] == pytest.approx(0.0 if i == j else 1 - np.mean(cosines), abs=1e-6)


def test_a_site_whose_b_is_zero_is_far_from_all_and_breaks_nothing() -> None:
    updates = planted([0, 0, 1, 1], 0.1)
    updates["site-00"] = ArraySource({spec.name: np.zeros(spec.shape, np.float32) for spec in LAYOUT.tensors})
    assert np.isfinite(distances_of(list(updates.values()), LAYOUT)).all()
    assert set(clustered(updates, 4)) == set(updates)


def plain_silhouette(distances: NDArray[np.float64], labels: list[int]) -> float:
    """Write the definition out site by site."""
    values = []
    for i, label in enumerate(labels):
        own = [distances[i, j] for j, other in enumerate(labels) if other == label and j != i]
        if not own:
            values.append(0.0)
            continue
        far = [
            np.mean([distances[i, j] for j, other in enumerate(labels) if other == group])
            for group in set(labels) - {label}
        ]
        a, b = np.mean(own), min(far)
        values.append((b - a) / max(a, b))
    return float(np.mean(values))


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(4, 9), st.integers(2, 4))
def test_a_silhouette_follows_its_definition_and_the_partition_is_one(seed: int, count: int, num_groups: int) -> None:
    draw = rng.generator(seed)
    points = draw.standard_normal((count, 3))
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    labels = [index % num_groups for index in range(count)]
    groups = [[i for i, label in enumerate(labels) if label == g] for g in range(num_groups)]
    assert silhouette(distances, groups) == pytest.approx(plain_silhouette(distances, labels))
    found = best_partition(distances, 8)
    assert sorted(itertools.chain(*found)) == list(range(count))
    assert [len(group) for group in found] == sorted((len(group) for group in found), reverse=True)
