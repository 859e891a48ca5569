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
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from fedllm.lora.cut import own_components
from fedllm.lora.pairs import pairs_of
from fedllm.update import Arrays, Contribution, Layout, TensorSpec
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
    """Running weighted sums of what sites changed, and for every component of the weights of the sites that hold it.

    With c the share of the weight that holds a component, the padded mean is `c received + sum_k p_k step_k`.
    """

    setup: PaddedMean
    layout: Layout
    origin: Origin
    sums: dict[str, Matrix] = field(default_factory=dict)
    held: dict[str, Matrix] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    reads_until_finish = False

    def fold(self, update: UpdateSource, contribution: Contribution) -> None:
        """Add a site's steps as far as it holds the components."""
        weight = contribution.weight if self.setup.weighting == "contribution" else self._norm(update, contribution)
        for pair in pairs_of(self.layout):
            rank = contribution.rank or pair.rank
            held = self.held.setdefault(pair.layer, np.zeros(pair.rank))
            held[:rank] += weight
            for spec in (pair.b, pair.a):
                self._add(update, spec, weight, None if rank == pair.rank else own_components(spec, rank))
        self.weights[contribution.site] = weight

    def finish(self) -> tuple[Arrays, Measurements]:
        """Return the difference to the padded mean, and its norm; the sums are used up."""
        assert self.sums, "finish() needs at least one update"
        delta: Arrays = {}
        squares, whole = [], math.fsum(self.weights.values())
        for pair in pairs_of(self.layout):
            missing = self.held[pair.layer] / whole - 1.0 if whole else np.zeros(pair.rank)  # [R], c - 1
            for spec, share in ((pair.b, missing), (pair.a, missing[:, None])):
                step = self.sums.pop(spec.name)
                if whole:  # no site applies anything: weights by norm have nothing to go by
                    step /= whole
                step += share * self.origin.received[spec.name]
                squares.append(float(np.vdot(step, step)))
                delta[spec.name] = step.astype(np.float32)
        shares = {f"share/{site}": weight / whole for site, weight in self.weights.items()} if whole else {}
        measured = {"delta_norm": math.sqrt(math.fsum(squares)), **shares}
        return {name: delta[name] for name in self.layout.names}, measured

    def _add(self, update: UpdateSource, spec: TensorSpec, weight: float, own: tuple[slice, ...] | None) -> None:
        sums = self.sums.setdefault(spec.name, np.zeros(spec.shape))
        if own is None:
            update.add_to(spec.name, sums, weight)
        else:
            sums[own] += weight * update.read(spec.name)[own].astype(np.float64)

    def _norm(self, update: UpdateSource, contribution: Contribution) -> float:
        """Return the norm of all that a site applies."""
        squares = []
        for pair in pairs_of(self.layout):
            rank = contribution.rank or pair.rank
            b, a = (self._trained(update, spec, rank) for spec in (pair.b, pair.a))
            squares.append(product(b, a, self.setup.scale).norm ** 2)
        return math.sqrt(math.fsum(squares))

    def _trained(self, update: UpdateSource, spec: TensorSpec, rank: int) -> Matrix:
        own = own_components(spec, rank)
        return np.asarray(self.origin.received[spec.name][own] + update.read(spec.name)[own].astype(np.float64))
