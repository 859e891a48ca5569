"""How far each strategy's aggregate is from the weighted mean of the sites' products, and what that takes the server.

Eight sites train one layer from common factors and drift apart by a share of the factors' size. The error is the relative
Frobenius norm of the difference to `sum_k p_k s_k B_k A_k`, multiplied out in float64.

    python -m benchmarks.exactness --json
"""

from __future__ import annotations

import argparse

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import machine, median_seconds, show
from fedllm import rng
from fedllm.config import RunConfig, read_run_config
from fedllm.lora.pairs import pairs_of, with_rank
from fedllm.update import Arrays, Contribution, Layout, TensorSpec
from strategies.registry import build_strategy
from strategies.slots import ArraySource, Origin, Strategy

NAMES = ("fedavg", "lora-fair", "flexlora", "florist", "fedex", "flora")
DRIFTS = (0.01, 0.1, 0.3, 1.0)
NUM_SITES = 8
LAYERS = {"SmolLM2-135M": (576, 576), "8B": (4096, 4096)}
"""Rows and columns of a query projection."""


def layout_for(shape: tuple[int, int], rank: int, side_rank: int) -> Layout:
    """Return the layout of one layer."""
    b = TensorSpec("m.lora_B.weight", (shape[0], rank), role="lora_B")
    a = TensorSpec("m.lora_A.weight", (rank, shape[1]), role="lora_A")
    return with_rank(Layout((a, b)), rank, side_rank)


def drawn(layout: Layout, seed: int, size: float) -> Arrays:
    """Draw the trained factors; side factors are zero."""
    draw = rng.generator(seed, purpose="benchmark")
    sizes = {spec.name: size if spec.role.startswith("lora") else 0.0 for spec in layout.tensors}
    return {s.name: np.float32(sizes[s.name]) * draw.standard_normal(s.shape, np.float32) for s in layout.tensors}


def aggregate(strategy: Strategy, origin: Origin, updates: list[Arrays]) -> Arrays:
    """Return the state after a round."""
    sent = strategy.work.at(1).sent(origin.layout)
    aggregation = strategy.aggregator.start(sent, origin)
    for number, update in enumerate(updates):
        aggregation.fold(ArraySource(update), Contribution(f"site-{number}", 1.0, {}))
    delta, _ = aggregation.finish()
    return {name: value + delta.get(name, 0) for name, value in origin.params.items()}


def applied(state: Arrays, layout: Layout, scale: float) -> NDArray[np.float64]:
    """Multiply out what a state applies."""
    [pair] = pairs_of(layout)
    wide = {name: value.astype(np.float64) for name, value in state.items()}
    side = wide[pair.side_b] @ wide[pair.side_a] if pair.side_rank else 0.0
    return np.asarray(scale * wide[pair.b.name] @ wide[pair.a.name] + side)


def measure(config: RunConfig, shape: tuple[int, int], drift: float, repeats: int) -> tuple[float, float]:
    """Return a strategy's error and its seconds."""
    strategy, scale = build_strategy(config), config.adapter.scale
    layout = layout_for(shape, config.adapter.rank, strategy.side_rank)
    params = drawn(layout, 0, 1.0)
    updates = [drawn(layout, 1 + number, drift) for number in range(NUM_SITES)]
    origin = Origin(1, layout, params, params)
    trained = [{name: params[name] + update[name] for name in params} for update in updates]
    ideal = sum(applied(one, layout, scale) for one in trained) / NUM_SITES
    found = applied(aggregate(strategy, origin, updates), layout, scale)
    seconds = median_seconds(lambda: aggregate(strategy, origin, updates), repeats) if repeats else 0.0
    return float(np.linalg.norm(found - ideal) / np.linalg.norm(ideal)), seconds


def main() -> None:
    """Measure every strategy and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats (default: %(default)s)")
    arguments = parser.parse_args()
    result: dict[str, object] = {"machine": machine(), "sites": NUM_SITES}
    for name in NAMES:
        config = read_run_config({"strategy.name": name})
        for drift in DRIFTS:
            error, _ = measure(config, LAYERS["SmolLM2-135M"], drift, 0)
            result[f"{name}.error_at_drift_{drift:g}"] = float(f"{error:.2e}")
        for model, shape in LAYERS.items():
            _, seconds = measure(config, shape, DRIFTS[1], arguments.repeats)
            result[f"{name}.ms_per_layer.{model}"] = round(1000 * seconds, 1)
    show(result, as_json=arguments.json)


if __name__ == "__main__":
    main()
