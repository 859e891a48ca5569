"""Matrices of updates as the aggregators take them, for tests of robust rules.

Shape legend: K updates, D coordinates of the layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedllm import rng
from fedllm.config import Scalar, read_run_config
from fedllm.update import Arrays, Contribution, Layout, TensorSpec, zeros
from strategies.robust.build import build_aggregator
from strategies.slots import ArraySource, Measurements, Origin

Matrix = NDArray[np.float64]

RULES: dict[str, dict[str, Scalar]] = {
    "median": {"strategy.aggregator": "median"},
    "trimmed-mean": {"strategy.aggregator": "trimmed-mean"},
    "krum": {"strategy.aggregator": "krum"},
    "multi-krum": {"strategy.aggregator": "multi-krum"},
    "geometric-median": {"strategy.aggregator": "geometric-median"},
    "fltrust": {"strategy.aggregator": "fltrust", "strategy.trusted_site": "site-00"},
    "norm bound": {"strategy.norm_bound": "median"},
}
"""Settings of every robust rule."""

SITE_RULES = ("krum", "multi-krum", "geometric-median", "fltrust", "norm bound")
"""Rules with a verdict on whole updates, which can compare products."""

LAYOUT = Layout(
    (
        TensorSpec("layers.0.lora_A.weight", (3, 12), role="lora_A"),
        TensorSpec("layers.0.lora_B.weight", (10, 3), role="lora_B"),
        TensorSpec("layers.1.lora_A.weight", (3, 7), role="lora_A"),
        TensorSpec("layers.1.lora_B.weight", (9, 3), role="lora_B"),
        TensorSpec("prompt", (4, 5), role="prompt"),
    )
)


def to_arrays(row: Iterable[float] | Matrix, layout: Layout) -> Arrays:
    """Cut a flat row [D] into tensors."""
    flat, arrays, start = np.asarray(row), {}, 0
    for spec in layout.tensors:
        arrays[spec.name] = flat[start : start + spec.size].reshape(spec.shape).astype(np.float32)
        start += spec.size
    return arrays


def to_row(arrays: Mapping[str, NDArray[np.float32]], layout: Layout) -> Matrix:
    """Put tensors side by side, [D] in float64."""
    return np.concatenate([arrays[name].astype(np.float64).ravel() for name in layout.names])


def draw_rows(seed: int, count: int, layout: Layout = LAYOUT, scale: float = 1.0) -> Matrix:
    """Draw updates [K, D] that float32 holds exactly."""
    draw = rng.generator(seed, purpose="rows")
    rows = scale * (draw.standard_normal(layout.num_parameters) + draw.standard_normal((count, layout.num_parameters)))
    return rows.astype(np.float32).astype(np.float64)


def draw_state(seed: int, layout: Layout = LAYOUT) -> Arrays:
    """Draw a state that sites could have received."""
    return to_arrays(rng.generator(seed, purpose="state").standard_normal(layout.num_parameters), layout)


def origin(layout: Layout, received: Arrays | None = None) -> Origin:
    """Return where a round starts from, zeros if nothing is said."""
    state = zeros(layout) if received is None else received
    return Origin(1, layout, state, state)


def aggregate(
    rows: Matrix,
    settings: Mapping[str, Scalar],
    *,
    layout: Layout = LAYOUT,
    received: Arrays | None = None,
    weights: Sequence[float] | None = None,
    sites: Sequence[str] | None = None,
) -> tuple[Matrix, Measurements]:
    """Aggregate updates [K, D] as a run with these settings does; return the aggregate [D] and what was measured."""
    aggregator = build_aggregator(read_run_config(settings))
    aggregation = aggregator.start(layout, origin(layout, received))
    for number, row in enumerate(rows):
        site = sites[number] if sites else f"site-{number:02}"
        contribution = Contribution(site, weights[number] if weights else 1.0, {})
        aggregation.fold(ArraySource(to_arrays(row, layout)), contribution)
    delta, measured = aggregation.finish()
    return to_row(delta, layout), measured
