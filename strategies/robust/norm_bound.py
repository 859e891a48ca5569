"""Scale down updates that are larger than a bound.

Sun et al., "Can You Really Backdoor Federated Learning?", 2019, arXiv 1911.07963: `delta_k min(1, M / |delta_k|)`. What
one site can do is then bounded, and a model-replacement attack, which needs a large update, loses its force; an update of
ordinary size in a bad direction passes.

Where we differ: M can be the median of the round's norms, which follows the training, and which fewer than half of the
sites cannot move beyond the norms of honest sites. On products, the factor is the smallest that brings the *product's*
change to M (see :func:`strategies.robust.space.scales_to`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedllm.update import Contribution
from strategies.robust.judged import Verdict, measured_norms, weight_shares
from strategies.robust.space import Space, norms, scales_to


@dataclass(frozen=True)
class NormBound:
    """Norms are at most a bound; the sites' own weights stay.

    Args:
        bound: The largest norm, positive; None for the median of the round.
    """

    bound: float | None

    def judge(self, space: Space, contributions: Sequence[Contribution]) -> Verdict:
        """Give every site the largest factor up to 1 that keeps the bound."""
        growth = space.growth()
        lengths = norms(growth)
        bound = float(np.median(lengths)) if self.bound is None else self.bound
        too_large = lengths > bound
        scales = np.where(too_large, scales_to(growth, bound), 1.0)
        measured = {
            "norm_bound": bound,
            "sites_scaled": int(np.count_nonzero(too_large)),
            "scale_min": float(scales.min()),
            **measured_norms(lengths),
        }
        return Verdict(weight_shares(contributions), scales, measured)
