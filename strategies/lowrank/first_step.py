"""The mean product of a first round as the two fixed factors and the square matrix of the rounds that follow.

The product's best approximation of the adapter's rank is `U S V^T`. U becomes B and V^T becomes A, which stay; the singular
values, divided by the adapter's scale, are the first matrix between them. What the rank leaves out is lost, once, and
measured. From the second round on updates hold the matrix alone, and their mean is the mean of the products.

Shape legend: O out, I in, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedllm.lora.heads import middle_name
from fedllm.lora.pairs import pairs_of
from fedllm.update import Arrays, Contribution, Layout
from strategies.slots import Aggregation, Aggregator, Measurements, Origin, UpdateSource


@dataclass(frozen=True)
class FirstStep:
    """An aggregator that chooses the fixed factors in round 1.

    Args:
        first: Makes the next factors of round 1; the rows of its A are orthonormal.
        then: Aggregates the matrices of later rounds.
    """

    first: Aggregator
    then: Aggregator

    def start(self, layout: Layout, origin: Origin) -> Aggregation:
        """Begin the aggregate of a round."""
        return (
            _Fixing(self.first.start(layout, origin), origin) if origin.round == 1 else self.then.start(layout, origin)
        )


@dataclass(frozen=True)
class _Fixing:
    """Takes B apart into orthonormal columns and a square matrix."""

    inner: Aggregation
    origin: Origin

    @property
    def reads_until_finish(self) -> bool:
        """As the aggregation behind it."""
        return self.inner.reads_until_finish

    def fold(self, update: UpdateSource, contribution: Contribution) -> None:
        """Take an update in."""
        self.inner.fold(update, contribution)

    def finish(self) -> tuple[Arrays, Measurements]:
        """Return the difference to the fixed factors and the first matrix."""
        delta, measured = self.inner.finish()
        params = self.origin.params
        for pair in pairs_of(self.origin.layout):
            name, middle = pair.b.name, middle_name(pair.layer)
            basis, core = np.linalg.qr(params[name] + delta[name].astype(np.float64))  # [O, R], [R, R]
            sign = np.where(np.diag(core) < 0, -1.0, 1.0)
            delta[name] = np.asarray(basis * sign - params[name], np.float32)
            delta[middle] = np.asarray((sign[:, None] * core)[None] - params[middle], np.float32)
        return {name: delta[name] for name in self.origin.layout.names if name in delta}, measured
