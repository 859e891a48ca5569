"""Aggregators of products and of padded factors, in memory, against the dense oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedllm import rng
from fedllm.config import read_run_config
from fedllm.errors import ConfigError
from fedllm.lora.pairs import pairs_of, with_rank
from fedllm.model.initial import initial_arrays
from fedllm.update import Arrays, Contribution, Layout, TensorSpec
from server_app.app import with_needs
from strategies.compatibility import check_compatibility
from strategies.lowrank.mean import ProductMean
from strategies.lowrank.padded import PaddedMean
from strategies.lowrank.rules import Averages, Refactored, Restart, Rule, TopComponents
from strategies.registry import RECIPES, build_strategy
from strategies.slots import Aggregator, ArraySource, Measurements, Origin
from tests.dense_oracle import Dense, SiteFactors, ideal_update, relative_error

SCALE = 0.5
SMALL = Layout(
    tuple(
        spec
        for index, (num_out, num_in) in enumerate([(20, 30), (12, 9)])
        for spec in (
            TensorSpec(f"m.{index}.lora_A.weight", (3, num_in), role="lora_A"),
            TensorSpec(f"m.{index}.lora_B.weight", (num_out, 3), role="lora_B"),
        )
    )
)


def drawn(layout: Layout, seed: int, size: float = 1.0) -> Arrays:
    draw = rng.generator(seed, purpose="arrays")
    return {spec.name: np.float32(size) * draw.standard_normal(spec.shape, np.float32) for spec in layout.tensors}


def origin_for(side_rank: int, round_: int = 1) -> Origin:
    layout = with_rank(SMALL, 3, side_rank)
    params = drawn(layout, 1)
    return Origin(round_, layout, params, params)


def aggregate(
    aggregator: Aggregator, origin: Origin, updates: list[Arrays], ranks: list[int]
) -> tuple[Arrays, Measurements]:
    """Fold updates of weight 1, 2, ... and return the next state."""
    aggregation = aggregator.start(SMALL, origin)
    for number, (update, rank) in enumerate(zip(updates, ranks, strict=True)):
        aggregation.fold(ArraySource(update), Contribution(f"s{number}", number + 1.0, {}, rank))
    delta, measured = aggregation.finish()
    return {name: value + delta.get(name, 0) for name, value in origin.params.items()}, measured


def applied(state: Arrays, layout: Layout, layer: int) -> Dense:
    pair = pairs_of(layout)[layer]
    wide = {name: value.astype(np.float64) for name, value in state.items()}
    side = wide[pair.side_b] @ wide[pair.side_a] if pair.side_rank else 0.0
    return np.asarray(SCALE * wide[pair.b.name] @ wide[pair.a.name] + side)


def ideal(origin: Origin, updates: list[Arrays], layer: int) -> Dense:
    pair = pairs_of(origin.layout)[layer]
    rows = [
        SiteFactors(
            number + 1.0,
            SCALE,
            *(np.asarray(origin.received[n] + update[n].astype(np.float64)) for n in (pair.b.name, pair.a.name)),
        )
        for number, update in enumerate(updates)
    ]
    before = {name: value.astype(np.float64) for name, value in origin.received.items()}
    side = before[pair.side_b] @ before[pair.side_a] if pair.side_rank else 0.0
    return ideal_update(rows) + side


@pytest.mark.parametrize("rule", [Averages(), Restart(), TopComponents(), TopComponents(0.6)])
def test_with_side_factors_that_are_large_enough_every_rule_is_exact(rule: Rule) -> None:
    origin = origin_for(20)
    updates = [drawn(SMALL, seed, 0.3) for seed in (5, 6, 7)]
    state, measured = aggregate(ProductMean(rule, SCALE, 0), origin, updates, [0, 0, 0])
    for layer in (0, 1):
        assert relative_error(applied(state, origin.layout, layer), ideal(origin, updates, layer)) < 3e-7
    assert measured["discarded_energy"] < 1e-28
    moved = [ideal(origin, updates, layer) - applied(origin.params, origin.layout, layer) for layer in (0, 1)]
    assert measured["delta_norm"] == pytest.approx(np.sqrt(sum(np.sum(one**2) for one in moved)))


@pytest.mark.parametrize("rule", [Averages(), Restart(), TopComponents()])
@pytest.mark.parametrize("side_rank", [0, 2])
def test_what_does_not_fit_is_measured(rule: Rule, side_rank: int) -> None:
    origin = origin_for(side_rank)
    updates = [drawn(SMALL, seed, 0.3) for seed in (5, 6, 7)]
    state, measured = aggregate(ProductMean(rule, SCALE, 0), origin, updates, [0, 0, 0])
    targets = [ideal(origin, updates, layer) for layer in (0, 1)]
    lost = sum(np.sum((applied(state, origin.layout, layer) - targets[layer]) ** 2) for layer in (0, 1))
    share = lost / sum(np.sum(target**2) for target in targets)
    assert measured["discarded_energy"] == pytest.approx(share, rel=1e-5)
    assert share > 1e-4


def test_what_a_lossy_downlink_dropped_stays_in_the_product() -> None:
    exact = origin_for(20)
    decoded = {name: value + 0.01 * drawn(exact.layout, 9)[name] for name, value in exact.params.items()}
    origin = replace(exact, received=decoded)
    updates = [drawn(SMALL, seed, 0.3) for seed in (5, 6)]
    state, _ = aggregate(ProductMean(Restart(), SCALE, 0), origin, updates, [0, 0])
    for layer in (0, 1):
        ours, theirs = (applied(arrays, origin.layout, layer) for arrays in (origin.params, origin.received))
        expected = ours + ideal(origin, updates, layer) - theirs
        assert relative_error(applied(state, origin.layout, layer), expected) < 3e-7


def test_components_that_are_left_over_start_anew_and_can_learn() -> None:
    origin = origin_for(20)
    nothing = {spec.name: np.zeros(spec.shape, np.float32) for spec in origin.layout.tensors}
    state, _ = aggregate(
        ProductMean(TopComponents(), SCALE, 0),
        replace(origin, params=nothing, received=nothing),
        [drawn(SMALL, 5, 0)],
        [0],
    )
    for pair in pairs_of(origin.layout):
        assert not state[pair.b.name].any()
        assert np.linalg.matrix_rank(state[pair.a.name]) == 3


def test_a_restart_draws_another_a_in_every_round_and_the_same_from_the_same_seed() -> None:
    update = drawn(SMALL, 5)
    [first, again, second, other] = [
        aggregate(ProductMean(Restart(), SCALE, seed), origin_for(20, round_), [update], [0])[0]["m.0.lora_A.weight"]
        for seed, round_ in ((0, 1), (0, 1), (0, 2), (1, 1))
    ]
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - second).max() > 0.01
    assert np.abs(first - other).max() > 0.01
    assert np.abs(first - initial_arrays(SMALL, 0)["m.0.lora_A.weight"]).max() > 0.01


def test_re_factoring_keeps_what_is_applied_and_makes_a_orthonormal() -> None:
    origin = origin_for(0)
    updates = [{n: v for n, v in drawn(SMALL, seed).items() if "lora_B" in n} for seed in (5, 6)]
    part = SMALL.only([name for name in SMALL.names if "lora_B" in name])
    aggregation = ProductMean(Refactored(), SCALE, 0).start(part, origin)
    for update in updates:
        aggregation.fold(ArraySource(update), Contribution("s", 1.0, {}))
    delta, measured = aggregation.finish()
    state = {name: value + delta[name] for name, value in origin.params.items()}
    for pair in pairs_of(SMALL):
        b = origin.params[pair.b.name].astype(float) + np.mean([update[pair.b.name] for update in updates], axis=0)
        expected = SCALE * b @ origin.params[pair.a.name].astype(float)
        assert relative_error(SCALE * state[pair.b.name].astype(float) @ state[pair.a.name], expected) < 1e-6
        np.testing.assert_allclose(state[pair.a.name] @ state[pair.a.name].T, np.eye(3), atol=1e-5)
    assert measured["discarded_energy"] < 1e-20


@pytest.mark.parametrize("weighting", ["contribution", "norm"])
def test_the_padded_mean_is_the_mean_of_what_each_site_holds(weighting: str) -> None:
    origin = origin_for(0)
    updates, ranks = [drawn(SMALL, seed, 0.3) for seed in (5, 6, 7)], [3, 1, 2]
    state, _ = aggregate(PaddedMean(weighting, SCALE), origin, updates, ranks)  # type: ignore[arg-type]
    held = [
        {n: origin.received[n].astype(float) + update[n] for n in SMALL.names} for update in updates
    ]  # each in its own copy
    for one, rank in zip(held, ranks, strict=True):
        for pair in pairs_of(SMALL):
            one[pair.b.name][:, rank:] = 0
            one[pair.a.name][rank:] = 0
    products = [[SCALE * one[p.b.name] @ one[p.a.name] for p in pairs_of(SMALL)] for one in held]
    norms = [np.sqrt(sum(np.sum(value**2) for value in rows)) for rows in products]
    weights = np.array([1.0, 2.0, 3.0]) if weighting == "contribution" else np.array(norms)
    for name in SMALL.names:
        expected = np.sum([w * one[name] for w, one in zip(weights / weights.sum(), held, strict=True)], axis=0)
        np.testing.assert_allclose(state[name], expected, rtol=1e-5, atol=1e-6)


PRODUCTS = ["fed-sb", "fedex", "fedsvd", "flexlora", "flora", "florist", "lora-fair"]


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize(
    "change",
    [
        {"strategy.server_optimizer": "adam"},
        {"strategy.server_learning_rate": 0.5},
        {"strategy.server_momentum": 0.9},
        {"strategy.server_anneal": "cosine"},
    ],
)
def test_a_server_optimizer_is_refused_where_factors_are_replaced(name: str, change: dict[str, Any]) -> None:
    config = read_run_config({"strategy.name": name, **change})
    with pytest.raises(ConfigError, match=rf"strategy.name = '{name}' cannot be combined with a server optimizer"):
        check_compatibility(config)


def test_what_a_strategy_needs_of_the_adapter_is_filled_in_and_refused_elsewhere() -> None:
    needs = {}
    for name in RECIPES:
        config = read_run_config({"strategy.name": name})
        adapter = with_needs(config, build_strategy(config)).adapter
        needs[name] = (adapter.side_rank, adapter.num_heads)
    found = {name: need for name, need in needs.items() if any(need)}
    assert found == {"fedex": (64, 0), "flora": (64, 0), "florist": (64, 0), "fed-sb": (0, 1), "ravan": (0, 4)}
    for settings in (
        {"strategy.name": "flora", "adapter.side_rank": 5},
        {"strategy.name": "ravan", "adapter.num_heads": 2},
    ):
        config = read_run_config(settings)
        assert with_needs(config, build_strategy(config)) == config


@pytest.mark.parametrize(
    ("name", "key"), [("fedavg", "side_rank"), ("fedavg", "num_heads"), ("fed-sb", "num_heads"), ("ravan", "side_rank")]
)
def test_what_a_strategy_does_not_have_is_refused(name: str, key: str) -> None:
    config = read_run_config({"strategy.name": name, f"adapter.{key}": 4})
    with pytest.raises(ConfigError, match=rf"adapter.{key} has no effect with strategy '{name}'"):
        with_needs(config, build_strategy(config))
