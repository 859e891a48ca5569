"""The mean of factors padded with zeros, where a site applies its own components only: the baseline of product rules.

Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models" (HetLoRA), EMNLP 2024, arXiv
2401.06432: a site of rank r holds the first r components; factors are padded to the largest rank, averaged with weights,
and cut to each site's rank. A component that only the share f of the weight holds counts f in both factors, so f^2 in the
product where f is right: with ranks [4, 4, 8, 8, 16, 16, 32, 64] that alone is 40 % error.

HetLoRA weighs sites by the norm of what they apply, `p_k = |s_k B_k A_k| / sum_j |s_j B_j A_j|`, in place of their
examples. Where we differ: its local regulariser and self-pruning are not here, so a site's rank stays what it chose.

Memory: one running sum of the adapter's size; with weights by norm, one layer of one update beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from fedllm.lora.pairs import Pair, pairs_of
from fedllm.update import Arrays, Contribution, Layout
from strategies.lowrank.product import Matrix, product
from strategies.slots import Aggregation, Measurements, Origin, UpdateSource

Weighting = Literal["contribution", "norm"]


@dataclass(frozen=True)
class PaddedMean:
    """An aggregator of LoRA updates of unequal ranks.

    Args:
        weighting: `contribution` for the sites' usual weights, `norm` for the norm of what each site applies (HetLoRA).
        scale: s of the federation's adapter.
    """

    weighting: Weighting
    scale: float

    def start(self, layout: Layout, origin: Origin) -> Aggregation:
        """Begin the mean of a round."""
        return _Padded(self, layout, origin)


@dataclass
class _Padded:
    """Running weighted sums of the padded factors."""

    setup: PaddedMean
    layout: Layout
    origin: Origin
    sums: dict[str, Matrix] = field(default_factory=dict)
    whole: float = 0.0
    reads_until_finish = False

    def fold(self, update: UpdateSource, contribution: Contribution) -> None:
        """Add a site's factors as far as it holds them."""
        weight = contribution.weight if self.setup.weighting == "contribution" else self._norm(update, contribution)
        for _, factors in self._factors(update, contribution):
            for name, value in factors.items():
                self.sums[name] = self.sums.get(name, 0.0) + weight * value
        self.whole += weight

    def finish(self) -> tuple[Arrays, Measurements]:
        """Return the difference to the padded mean, and its norm."""
        assert self.sums, "finish() needs at least one update"
        received = self.origin.received
        if not self.whole:  # no site applies anything: weights by norm have nothing to go by
            return {name: np.zeros_like(received[name]) for name in self.sums}, {"delta_norm": 0.0}
        delta = {name: np.asarray(value / self.whole - received[name]) for name, value in self.sums.items()}
        norm = math.sqrt(math.fsum(float(np.vdot(value, value)) for value in delta.values()))
        return {name: delta[name].astype(np.float32) for name in self.layout.names}, {"delta_norm": norm}

    def _norm(self, update: UpdateSource, contribution: Contribution) -> float:
        norms = (
            product(factors[pair.b.name], factors[pair.a.name], self.setup.scale).norm
            for pair, factors in self._factors(update, contribution)
        )
        return math.sqrt(math.fsum(norm**2 for norm in norms))

    def _factors(self, update: UpdateSource, contribution: Contribution) -> Iterator[tuple[Pair, dict[str, Matrix]]]:
        """Yield the factors that the site trained, layer by layer, zero where it holds nothing."""
        for pair in pairs_of(self.layout):
            b, a = (self._trained(update, spec.name) for spec in (pair.b, pair.a))
            held = contribution.rank or pair.rank
            b[:, held:] = 0.0
            a[held:] = 0.0
            yield pair, {pair.b.name: b, pair.a.name: a}

    def _trained(self, update: UpdateSource, name: str) -> Matrix:
        return np.asarray(self.origin.received[name] + update.read(name).astype(np.float64))
