"""Mistakes that published implementations make, each excluded for the strategies as they are registered.

Every test builds its strategy from a run config and compares with the dense float64 oracle, so that it fails whatever part
makes the mistake. More of the same kind, next to what they are about: scales left out and square roots on one factor in
`test_lowrank_rules.py`, distances of parameters in place of deltas in `tests/properties/test_robust_laws.py`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from fedllm import rng
from fedllm.config import RunConfig, SimulationConfig, StrategyConfig, read_run_config
from fedllm.lora.cut import own_components
from fedllm.lora.pairs import pairs_of, with_rank
from fedllm.update import Arrays, Contribution, Layout, TensorSpec
from strategies.fedavg import build_optimizer
from strategies.registry import RECIPES, build_strategy
from strategies.slots import ArraySource, OptimizerState, Origin, Strategy
from tests.dense_oracle import Dense, SiteFactors, ideal_update, relative_error

PRODUCTS = ("fedex", "flora", "florist", "fedsvd", "flexlora", "lora-fair")
FACTORS = sorted(set(RECIPES) - {"fedprompt", "fedpeptao", "fed-sb", "ravan", "scaffold"})
"""Strategies on plain LoRA factors; control variates and heads travel as other tensors."""


def lora(num_out: int, num_in: int, rank: int, layer: str = "m.layers.0.q") -> Layout:
    """Return one layer's layout."""
    a = TensorSpec(f"{layer}.lora_A.weight", (rank, num_in), role="lora_A")
    return Layout((a, TensorSpec(f"{layer}.lora_B.weight", (num_out, rank), role="lora_B")))


def config_for(name: str, rank: int, **changes: object) -> RunConfig:
    """Return a run config whose scale is not 1."""
    return read_run_config({"strategy.name": name, "adapter.rank": rank, "adapter.alpha": 3.0 * rank, **changes})  # type: ignore[dict-item]


def drawn(layout: Layout, seed: int, size: float = 1.0) -> Arrays:
    draw = rng.generator(seed, purpose="mistakes")
    return {spec.name: np.float32(size) * draw.standard_normal(spec.shape, np.float32) for spec in layout.tensors}


def origin_for(strategy: Strategy, layout: Layout, rank: int) -> Origin:
    layout = with_rank(layout, rank, strategy.side_rank)
    params = drawn(layout, 99)
    return Origin(1, layout, params, params)


def after(strategy: Strategy, origin: Origin, updates: list[Arrays], weights: list[float]) -> Arrays:
    """Return the state after the first round."""
    sent = strategy.work.at(1).sent(origin.layout)
    aggregation = strategy.aggregator.start(sent, origin)
    for number, (update, weight) in enumerate(zip(updates, weights, strict=True)):
        part = {name: update[name] for name in sent.names}
        aggregation.fold(ArraySource(part), Contribution(f"site-{number}", weight, {}))
    delta, _ = aggregation.finish()
    params, _ = strategy.optimizer.apply(OptimizerState(), origin.params, delta)
    return params


def applied(state: Arrays, layout: Layout, scale: float) -> Dense:
    """Multiply out what the only layer of a state applies."""
    [pair] = pairs_of(layout)
    wide = {name: value.astype(np.float64) for name, value in state.items()}
    side = wide[pair.side_b] @ wide[pair.side_a] if pair.side_rank else 0.0
    return np.asarray(scale * wide[pair.b.name] @ wide[pair.a.name] + side)


def ideal(strategy: Strategy, origin: Origin, updates: list[Arrays], weights: list[float], scale: float) -> Dense:
    """Return the weighted mean of what sites applied at the end of their training."""
    [pair] = pairs_of(origin.layout)
    sent = strategy.work.at(1).sent(origin.layout).names
    rows = []
    for update, weight in zip(updates, weights, strict=True):
        factors = {
            name: origin.params[name] + (update[name].astype(np.float64) if name in sent else 0.0)
            for name in (pair.b.name, pair.a.name)
        }
        rows.append(SiteFactors(weight, scale, factors[pair.b.name], factors[pair.a.name]))
    side = origin.params[pair.side_b].astype(np.float64) @ origin.params[pair.side_a] if pair.side_rank else 0.0
    return ideal_update(rows) + side


@pytest.mark.parametrize("name", FACTORS)
def test_every_site_counts(name: str) -> None:
    """FLoRA's published FedAvg averages the first site alone, because the sum goes into a misspelt variable."""
    config = config_for(name, 3)
    strategy, layout = build_strategy(config), lora(12, 10, 3)
    origin = origin_for(strategy, layout, 3)
    updates, weights = [drawn(layout, seed, 0.3) for seed in range(4)], [1.0, 2.0, 3.0, 4.0]
    state = after(strategy, origin, updates, weights)
    for number in range(4):
        changed = [*updates]
        changed[number] = drawn(layout, 50 + number, 0.3)
        other = after(strategy, origin, changed, weights)
        moved = relative_error(applied(other, origin.layout, 3.0), applied(state, origin.layout, 3.0))
        assert moved > 0.005, f"site {number} changes nothing"


@pytest.mark.parametrize("name", FACTORS)
def test_factors_are_told_apart_where_all_dimensions_are_the_rank(name: str) -> None:
    """FLoRA's published code takes for A whatever has `rank` rows, which B has too where the layer is as small."""
    config = config_for(name, 4)
    strategy, layout = build_strategy(config), lora(4, 4, 4)
    origin = origin_for(strategy, layout, 4)
    updates, weights = [drawn(layout, seed, 0.05) for seed in range(3)], [1.0, 2.0, 5.0]
    found = applied(after(strategy, origin, updates, weights), origin.layout, 3.0)
    expected = ideal(strategy, origin, updates, weights, 3.0)
    # With rank 4 nothing is cut; the others average factors, and err by the drifts' product.
    assert relative_error(found, expected) < (1e-6 if strategy.is_exact or name == "flexlora" else 0.05)
    [pair] = pairs_of(layout)
    assert own_components(pair.a, 2)[0] == own_components(pair.b, 2)[1] == slice(2)


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_scale_is_inside_the_product(name: str) -> None:
    """A public library adds FedEx's residual and FLoRA's stack without alpha / rank."""
    strategy, layout = build_strategy(config_for(name, 6)), lora(12, 10, 6)
    origin = origin_for(strategy, layout, 6)
    updates, weights = [drawn(layout, seed, 1.0) for seed in range(3)], [1.0, 2.0, 5.0]
    expected = ideal(strategy, origin, updates, weights, 3.0)
    found = applied(after(strategy, origin, updates, weights), origin.layout, 3.0)
    careless = ideal(strategy, origin, updates, weights, 1.0)
    assert relative_error(careless, expected) > 0.4, "leaving the scale out would show"
    if strategy.is_exact:
        assert relative_error(found, expected) < 1e-6
    elif name == "flexlora":
        u, values, v = np.linalg.svd(expected)
        best = u[:, :6] * values[:6] @ v[:6]
        assert relative_error(found, best) < 1e-6, "the best approximation of the rank, singular values used once"


def test_flora_starts_again_from_a_fresh_adapter() -> None:
    """A public library merges the stack into the base and keeps the adapter too, so that it counts twice."""
    strategy, layout = build_strategy(config_for("flora", 3)), lora(12, 10, 3)
    origin = origin_for(strategy, layout, 3)
    state = after(strategy, origin, [drawn(layout, 1), drawn(layout, 2)], [1.0, 1.0])
    [pair] = pairs_of(origin.layout)
    assert not state[pair.b.name].any()
    assert np.abs(state[pair.a.name] - origin.params[pair.a.name]).max() > 0.1


def test_florist_chooses_a_rank_for_every_layer() -> None:
    """The smallest that keeps the threshold's share of that very layer's energy."""
    threshold = 0.9
    strategy = build_strategy(config_for("florist", 8, **{"strategy.energy_threshold": threshold}))
    layers = [lora(30, 20, 8, f"m.layers.{index}.q") for index in range(2)]
    layout = Layout(tuple(spec for layer in layers for spec in layer.tensors))
    state = with_rank(layout, 8, strategy.side_rank)
    params = {name: np.zeros_like(value) for name, value in drawn(state, 0).items()}
    steps = drawn(layout, 1)
    steps[layers[1].names[1]][:, 2:] *= 0.01  # all but two components of the second layer are small
    found = after(strategy, Origin(1, state, params, params), [steps], [1.0])
    ranks = []
    for layer in layers:
        a, b = (steps[name].astype(np.float64) for name in layer.names)
        energy = np.linalg.svd(b @ a, compute_uv=False) ** 2
        ranks.append(1 + int(np.sum(np.cumsum(energy) / energy.sum() < threshold)))
        assert np.count_nonzero(found[layer.names[1]].any(axis=0)) == ranks[-1]
    assert ranks[1] <= 2 < ranks[0]


@pytest.mark.parametrize("name", get_args(StrategyConfig.model_fields["server_optimizer"].annotation))
def test_the_server_moves_along_the_delta(name: str) -> None:
    """A public library hands `local - global` to an optimizer that descends, and diverges."""
    config = read_run_config({"strategy.server_optimizer": name, "strategy.server_learning_rate": 0.01})
    params, delta = drawn(lora(12, 10, 3), 0), drawn(lora(12, 10, 3), 1, 0.1)
    moved, _ = build_optimizer(config).apply(OptimizerState(), params, delta)
    for key, step in delta.items():
        assert np.vdot(moved[key] - params[key], step) > 0


def test_what_the_documentation_names_is_registered_under_that_very_name() -> None:
    """A public library registers one of its strategies under a misspelt name, and refuses the right one."""
    text = (Path(__file__).parents[2] / "docs" / "strategies.md").read_text(encoding="utf-8")
    first_cells = re.findall(r"^\| (`[^|]*) \|", text, flags=re.MULTILINE)
    named = {name for cell in first_cells for name in re.findall(r"`([a-z-]+)`", cell)}
    assert set(RECIPES) <= named
    choices = {"mean", "median", "trimmed-mean", "krum", "multi-krum", "geometric-median", "fltrust"}
    kinds = {"prompt", "prefix", "ptuning"}
    attacks = set(get_args(SimulationConfig.model_fields["attack"].annotation))
    assert named <= {*RECIPES, *choices, *kinds, *attacks}
