"""How the updates of a round become one delta."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fedllm.update import Arrays, Contribution, Layout
from strategies.slots import Aggregation, Measurements, Origin, UpdateSource

Sums = dict[str, NDArray[np.float64]]


class WeightedMean:
    """The weighted mean of the deltas: FedAvg's rule (McMahan et al., "Communication-Efficient Learning of Deep Networks
    from Decentralized Data", AISTATS 2017, arXiv 1602.05629).

    On LoRA factors it is FedIT (Zhang et al., arXiv 2305.05644): the mean of the factors is not the factor of the mean;
    the error grows with the product of the drifts in A and B.

    The sums' memory is kept for the next round: taking as much anew from the system costs more than adding two updates up.
    """

    def __init__(self) -> None:
        self._spare: Sums = {}

    def start(self, layout: Layout, origin: Origin) -> Aggregation:  # noqa: ARG002 (a mean of deltas needs no origin)
        """Begin the mean of a round."""
        return _RunningMean(layout, self._sums(layout), self._keep)

    def _sums(self, layout: Layout) -> Sums:
        sums, self._spare = self._spare, {}
        if {name: value.shape for name, value in sums.items()} != {spec.name: spec.shape for spec in layout.tensors}:
            return _zeros(layout)
        for value in sums.values():
            value.fill(0)
        return sums

    def _keep(self, sums: Sums) -> None:
        self._spare = sums


class _RunningMean:
    """Running weighted sums in float64: about 1e-16 relative error a term, so folding order shows in no float32 bit but by
    rare rounding ties; deterministic runs fold in a fixed order all the same.

    Where sites send parts of an update only (a codec with `mask` or `segment`), each coordinate is averaged over the sites
    that sent it, and one that nobody sent does not move. A tensor that nobody sent is not in the mean, so that no momentum
    moves it either.
    """

    reads_until_finish = False

    def __init__(self, layout: Layout, sums: Sums, used_up: Callable[[Sums], None]) -> None:
        self._layout, self._sums, self._used_up = layout, sums, used_up
        self._total = 0.0
        self._covered: dict[str, NDArray[np.float64]] | None = None

    def fold(self, update: UpdateSource, contribution: Contribution) -> None:
        """Add `weight * delta`."""
        weight = contribution.weight
        assert weight > 0, "weights are checked before folding"
        if update.is_partial and self._covered is None:
            self._covered = {name: sums + self._total for name, sums in _zeros(self._layout).items()}
        for name in self._layout.names:
            update.add_to(name, self._sums[name], weight, self._covered[name] if self._covered else None)
        self._total += weight

    def finish(self) -> tuple[Arrays, Measurements]:
        """Return the mean and its norm; the sums are used up."""
        assert self._total > 0, "finish() needs at least one update"
        means: Arrays = {}
        squares = []
        for name in self._layout.names:
            if self._covered is not None and not self._covered[name].any():
                continue
            mean = self._mean(name, self._sums[name])
            squares.append(float(np.vdot(mean, mean)))
            means[name] = mean.astype(np.float32)
        self._used_up(self._sums)
        return means, {"delta_norm": math.sqrt(math.fsum(squares))}

    def _mean(self, name: str, sums: NDArray[np.float64]) -> NDArray[np.float64]:
        if self._covered is None:
            sums /= self._total
            return sums
        covered = self._covered[name]
        return np.divide(sums, covered, out=np.zeros_like(sums), where=covered > 0)


def _zeros(layout: Layout) -> Sums:
    return {spec.name: np.zeros(spec.shape) for spec in layout.tensors}
