"""Rules that look at each coordinate by itself: the median, and the mean without the extremes.

Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018, arXiv 1803.01498: the
coordinate-wise median, and the beta-trimmed mean, which leaves out the largest and the smallest share beta of the values
of every coordinate. The median is the trimmed mean that leaves one value, or two of an even number.

As in the paper, every site counts the same; the sites' weights are not used. The rules have no per-site verdict: a site
is ignored in some coordinates and used in others. On LoRA they act on the factors: a product of medians is not the median
of the products, which would not even have a low rank.

Shape legend: K updates, N elements of a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedllm.update import Arrays, Contribution, Layout
from strategies.robust.judged import measured_norms
from strategies.robust.space import COLUMNS, Vector
from strategies.slots import Aggregation, Measurements, Origin, UpdateSource


@dataclass(frozen=True)
class CoordinateMedian:
    """The median of every coordinate."""

    def start(self, layout: Layout, origin: Origin) -> Aggregation:  # noqa: ARG002 (see WeightedMean.start)
        """Begin the median of a round."""
        return _Trimming(layout, lambda count: (count - 1) // 2)


@dataclass(frozen=True)
class TrimmedMean:
    """The mean of every coordinate without its extremes.

    Args:
        fraction: Share of the values left out at either end, in [0, 0.5), rounded down to whole values.
    """

    fraction: float

    def start(self, layout: Layout, origin: Origin) -> Aggregation:  # noqa: ARG002 (see WeightedMean.start)
        """Begin the trimmed mean of a round."""
        return _Trimming(layout, lambda count: num_trimmed(self.fraction, count))


def num_trimmed(fraction: float, count: int) -> int:
    """Return how many of so many values are left out at either end, never all; 0.1 of 30 is 3."""
    return min(math.floor(fraction * count + 1e-9), (count - 1) // 2)


@dataclass
class _Trimming:
    """Notes the updates, then sorts them tensor by tensor."""

    layout: Layout
    num_trimmed: Callable[[int], int]
    updates: list[UpdateSource] = field(default_factory=list)
    reads_until_finish = True

    def fold(self, update: UpdateSource, contribution: Contribution) -> None:  # noqa: ARG002 (all sites count the same)
        """Note an update."""
        self.updates.append(update)

    def finish(self) -> tuple[Arrays, Measurements]:
        """Return the middle of every coordinate."""
        assert self.updates, "finish() needs at least one update"
        count = len(self.updates)
        cut = self.num_trimmed(count)
        squares = np.zeros(count)
        delta = {name: self._middle(name, cut, squares) for name in self.layout.names}
        norm = math.sqrt(math.fsum(float(np.sum(np.square(value, dtype=np.float64))) for value in delta.values()))
        kept = {"values_kept": count - 2 * cut, "values_trimmed": 2 * cut}
        return delta, {"delta_norm": norm, **kept, **measured_norms(np.sqrt(squares))}

    def _middle(self, name: str, cut: int, squares: Vector) -> NDArray[np.float32]:
        """Return one tensor of the aggregate [N], and add the squares of the updates' norms [K]."""
        count = len(self.updates)
        rows = np.empty((count, *self.layout[name].shape), np.float32)
        for number, update in enumerate(self.updates):
            rows[number] = update.read(name)
            squares[number] += np.sum(np.square(rows[number], dtype=np.float64))
        return _middle_of(rows.reshape(count, -1), cut).reshape(self.layout[name].shape)


def _middle_of(rows: NDArray[np.float32], cut: int) -> NDArray[np.float32]:
    """Return the mean [N] of every column [K] without so many of its extremes at either end."""
    middle = np.empty(rows.shape[1], np.float32)
    for start in range(0, len(middle), COLUMNS):
        part = rows[:, start : start + COLUMNS].copy()
        part.sort(axis=0)
        middle[start : start + COLUMNS] = part[cut : len(part) - cut].mean(axis=0, dtype=np.float64)
    return middle
