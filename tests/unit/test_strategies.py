"""Samplers, the running mean, and the registry."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm import rng
from fedllm.config import read_run_config
from fedllm.errors import ConfigError
from fedllm.update import Arrays, Contribution, Layout, TensorSpec, zeros
from strategies.aggregators import WeightedMean
from strategies.annealing import Annealed, Course
from strategies.optimizers import Sgd
from strategies.registry import RECIPES, build_strategy, register
from strategies.samplers import ShareSampler
from strategies.slots import Accumulator, ArraySource, OptimizerState, Origin

LAYOUT = Layout((TensorSpec("a", (3, 4), role="lora_A"), TensorSpec("b", (5, 3), role="lora_B")))
ORIGIN = Origin(1, LAYOUT, zeros(LAYOUT), zeros(LAYOUT))


def random_arrays(seed: int, scale: float = 1.0) -> Arrays:
    draw = rng.generator(seed, purpose="test")
    return {spec.name: (scale * draw.standard_normal(spec.shape)).astype(np.float32) for spec in LAYOUT.tensors}


def mean_of(updates: list[tuple[Arrays, float]]) -> Arrays:
    aggregation = WeightedMean().start(LAYOUT, ORIGIN)
    for number, (arrays, weight) in enumerate(updates):
        aggregation.fold(ArraySource(arrays), Contribution(f"site-{number}", weight, {}))
    return aggregation.finish()[0]


def test_the_mean_of_identical_updates_is_that_update() -> None:
    update = random_arrays(1)
    for name, value in mean_of([(update, 3.0), (update, 0.1), (update, 7.0)]).items():
        np.testing.assert_array_equal(value, update[name])


@given(st.lists(st.tuples(st.integers(0, 50), st.floats(0.01, 1e6)), min_size=1, max_size=8), st.randoms())
def test_the_mean_is_the_weighted_mean_and_order_does_not_matter(rows: list[tuple[int, float]], random: object) -> None:
    updates = [(random_arrays(seed), weight) for seed, weight in rows]
    total = sum(weight for _, weight in rows)
    mean = mean_of(updates)
    for name in LAYOUT.names:
        oracle = sum(weight / total * arrays[name].astype(np.float64) for arrays, weight in updates)
        np.testing.assert_allclose(mean[name], oracle, rtol=1e-6, atol=1e-7)
    shuffled = list(updates)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    for name, value in mean_of(shuffled).items():
        np.testing.assert_allclose(value, mean[name], rtol=1e-6, atol=1e-9)


def test_the_mean_measures_its_norm() -> None:
    update = random_arrays(1)
    aggregation = WeightedMean().start(LAYOUT, ORIGIN)
    aggregation.fold(ArraySource(update), Contribution("x", 2.0, {}))
    _, measured = aggregation.finish()
    norm = np.sqrt(sum(float(np.sum(value.astype(np.float64) ** 2)) for value in update.values()))
    assert measured["delta_norm"] == pytest.approx(norm)


def test_one_round_leaves_nothing_in_the_next_and_takes_nothing_from_the_last() -> None:
    aggregator, (first, second) = WeightedMean(), (random_arrays(1), random_arrays(2))
    means = [mean_of_one(aggregator, update) for update in (first, second)]
    assert_same(means[0], first)
    assert_same(means[1], second)


def test_two_means_at_a_time_do_not_share_their_sums() -> None:
    aggregator, updates = WeightedMean(), [random_arrays(1), random_arrays(2)]
    mean_of_one(aggregator, updates[0])  # leaves memory that only one of the next two can take
    running = [aggregator.start(LAYOUT, ORIGIN) for _ in updates]
    for aggregation, update in zip(running, updates, strict=True):
        aggregation.fold(ArraySource(update), Contribution("x", 3.0, {}))
    for aggregation, update in zip(running, updates, strict=True):
        assert_same(aggregation.finish()[0], update)


def test_a_mean_of_another_layout_takes_memory_of_its_own() -> None:
    aggregator, update = WeightedMean(), random_arrays(1)
    mean_of_one(aggregator, update)
    part = Layout(LAYOUT.tensors[:1])
    assert_same(mean_of_one(aggregator, update, part), {name: update[name] for name in part.names})


def mean_of_one(aggregator: WeightedMean, update: Arrays, layout: Layout = LAYOUT) -> Arrays:
    aggregation = aggregator.start(layout, ORIGIN)
    aggregation.fold(ArraySource(update), Contribution("x", 3.0, {}))
    return aggregation.finish()[0]


def assert_same(found: Arrays, expected: Arrays) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


class PartSource(ArraySource):
    """An update of which only the coordinates up to `until` were sent."""

    until = 2

    @property
    def is_partial(self) -> bool:
        return True

    def add_to(self, name: str, accumulator: Accumulator, weight: float, weights: Accumulator | None = None) -> None:
        accumulator.reshape(-1)[: self.until] += weight * self.arrays[name].reshape(-1)[: self.until]
        if weights is not None:
            weights.reshape(-1)[: self.until] += weight


@pytest.mark.parametrize("whole_first", [True, False])
def test_a_coordinate_is_averaged_over_the_sites_that_sent_it(whole_first: bool) -> None:
    whole, part = random_arrays(1), random_arrays(2)
    rows = [(ArraySource(whole), 3.0), (PartSource(part), 1.0)]
    aggregation = WeightedMean().start(LAYOUT, ORIGIN)
    for source, weight in rows if whole_first else rows[::-1]:
        aggregation.fold(source, Contribution("x", weight, {}))
    mean, _ = aggregation.finish()
    for name in LAYOUT.names:
        flat = mean[name].reshape(-1)
        np.testing.assert_allclose(
            flat[:2], (3 * whole[name].reshape(-1)[:2] + part[name].reshape(-1)[:2]) / 4, rtol=1e-6
        )
        np.testing.assert_allclose(flat[2:], whole[name].reshape(-1)[2:], rtol=1e-6)


def test_a_coordinate_that_nobody_sent_does_not_move() -> None:
    aggregation = WeightedMean().start(LAYOUT, ORIGIN)
    aggregation.fold(PartSource(random_arrays(2)), Contribution("x", 1.0, {}))
    mean, _ = aggregation.finish()
    assert all(not value.reshape(-1)[2:].any() and value.reshape(-1)[:2].all() for value in mean.values())


@pytest.mark.parametrize("course", ["linear", "cosine"])
def test_an_annealed_rate_falls_from_one_to_its_final_share(course: Course) -> None:
    annealed = Annealed(Sgd(), course, 0.1, 5)
    scales = [annealed.scale(step) for step in range(7)]
    assert scales[0] == 1.0
    assert scales[4:] == pytest.approx([0.1] * 3)
    assert scales[:5] == sorted(scales[:5], reverse=True)
    assert len(set(scales[:5])) == 5
    params, delta = random_arrays(0), random_arrays(1)
    moved, state = annealed.apply(OptimizerState(4), params, delta)
    assert state.step == 5
    np.testing.assert_allclose(moved["a"], params["a"] + 0.1 * delta["a"], rtol=1e-6)


def test_an_empty_mean_is_a_programming_error() -> None:
    with pytest.raises(AssertionError):
        WeightedMean().start(LAYOUT, ORIGIN).finish()


@given(
    st.integers(1, 30), st.floats(0.01, 1.0), st.integers(1, 5), st.floats(1.0, 3.0), st.integers(1, 100), st.booleans()
)
def test_a_uniform_sample_has_the_asked_size_and_only_joined_sites(
    num_sites: int, fraction: float, min_sites: int, over_selection: float, round_: int, reverse: bool
) -> None:
    sampler = ShareSampler(7, fraction, min_sites, over_selection)
    sites = {f"s{index}": 1 for index in range(num_sites)}
    chosen = sampler.select(sites, round_, 1)
    assert set(chosen) <= set(sites)
    assert len(set(chosen)) == len(chosen)
    assert min(num_sites, min_sites) <= sampler.num_wanted(num_sites) <= len(chosen) <= num_sites
    assert sampler.select(dict(reversed(sites.items())) if reverse else sites, round_, 1) == chosen


def test_a_uniform_sampler_reaches_every_site_and_varies_by_round_and_attempt() -> None:
    sampler = ShareSampler(0, 0.3, 1, 1.0)
    sites = {f"s{index}": 1 for index in range(10)}
    samples = [sampler.select(sites, round_, 1) for round_ in range(60)]
    counts = {site: sum(site in sample for sample in samples) for site in sites}
    assert min(counts.values()) >= 8, counts
    assert any(sampler.select(sites, round_, 2) != samples[round_] for round_ in range(10))


def test_every_registered_recipe_builds_a_strategy() -> None:
    for name in RECIPES:
        assert build_strategy(read_run_config({"strategy.name": name})).name == name


def test_an_unknown_strategy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"fedavg.*found fedavgg"):
        build_strategy(read_run_config({"strategy.name": "fedavgg"}))


def test_registering_a_taken_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="fedavg"):
        register("fedavg", build_strategy)
