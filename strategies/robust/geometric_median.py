"""The geometric median: the point with the smallest weighted sum of distances to the updates.

Pillutla, Kakade, Harchaoui, "Robust Aggregation for Federated Learning" (RFA), IEEE Transactions on Signal Processing 2022,
arXiv 1912.13445: the smoothed Weiszfeld algorithm, `v <- sum_k b_k w_k / sum_k b_k` with `b_k = a_k / max(nu, |v - w_k|)`
from the weighted mean on, `a_k` the sites' weights as shares. Half of the weight may lie.

Every iterate is a weighted mean of the updates, so the iteration is on the shares; each takes one reading of all updates.
A site's weight is what it says of its data: with `strategy.weighting = "uniform"` no site can claim more than its voice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedllm.update import Contribution
from strategies.robust.judged import Verdict, measured_norms, measured_shares, weight_shares
from strategies.robust.space import Space, distances_to_mean, norms


@dataclass(frozen=True)
class GeometricMedian:
    """Smoothed Weiszfeld iterations.

    Args:
        smoothing: nu, the distance below which a site gains no more influence, positive.
        max_iterations: Most iterations, at least 1; the paper finds three to be enough in practice.
        tolerance: It ends when the sum of distances falls by less than this share.
    """

    smoothing: float = 1e-6
    max_iterations: int = 8
    tolerance: float = 1e-6

    def judge(self, space: Space, contributions: Sequence[Contribution]) -> Verdict:
        """Give far sites small shares."""
        weights = weight_shares(contributions)
        shares, distances = weights, distances_to_mean(space, weights)
        for iterations in range(1, self.max_iterations + 1):  # noqa: B007 (it is measured)
            before = weights @ distances
            pulls = weights / np.maximum(self.smoothing, distances)
            shares = pulls / pulls.sum()
            distances = distances_to_mean(space, shares)
            if before - weights @ distances <= self.tolerance * before:
                break
        measured = {"iterations": iterations, "distance_mean": float(weights @ distances)}
        measured |= measured_norms(norms(space.growth())) | measured_shares(contributions, shares)
        return Verdict(shares, np.ones(len(shares)), measured)
