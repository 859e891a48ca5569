"""How the updates of a round become one delta."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fedllm.update import Arrays, Contribution, Layout
from strategies.slots import Aggregation, Measurements, TensorSource


class WeightedMean:
    """The weighted mean of the deltas: FedAvg's rule (McMahan et al., "Communication-Efficient Learning of Deep Networks
    from Decentralized Data", AISTATS 2017, arXiv 1602.05629).

    On LoRA factors it is FedIT (Zhang et al., arXiv 2305.05644): the mean of the factors is not the factor of the mean;
    the error grows with the product of the drifts in A and B.
    """

    def start(self, layout: Layout) -> Aggregation:
        """Begin the mean of a round."""
        return _RunningMean(layout)


class _RunningMean:
    """Running weighted sum in float64: about 1e-16 relative error a term, so folding order shows in no float32 bit but by
    rare rounding ties; deterministic runs fold in a fixed order all the same.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._sums: dict[str, NDArray[np.float64]] = {spec.name: np.zeros(spec.shape) for spec in layout.tensors}
        self._weights: list[float] = []
        self._norms: list[float] = []

    def fold(self, update: TensorSource, contribution: Contribution) -> None:
        """Add `weight * delta`."""
        assert contribution.weight > 0, "weights are checked before folding"
        squares = 0.0
        for spec in self._layout.tensors:
            delta = update.read(spec.name).astype(np.float64)
            squares += float(np.vdot(delta, delta))
            delta *= contribution.weight
            self._sums[spec.name] += delta
        self._weights.append(contribution.weight)
        self._norms.append(math.sqrt(squares))

    def finish(self) -> tuple[Arrays, Measurements]:
        """Return the mean, with the norms of the mean and of the updates."""
        assert self._weights, "finish() needs at least one update"
        total = math.fsum(self._weights)
        mean: Arrays = {name: (value / total).astype(np.float32) for name, value in self._sums.items()}
        squares = math.fsum(float(np.vdot(value, value)) for value in self._sums.values())
        return mean, {
            "delta_norm": math.sqrt(squares) / total,
            "mean_update_norm": math.fsum(self._norms) / len(self._norms),
        }
