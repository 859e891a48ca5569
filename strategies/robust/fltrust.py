"""Weigh every update by how well it points along a trusted one, at the trusted one's length.

Cao et al., "FLTrust: Byzantine-robust Federated Learning via Trust Bootstrapping", NDSS 2021, arXiv 2012.13995: with the
trusted update `d_0`, the aggregate is `sum_k t_k (|d_0| / |d_k|) d_k / sum_k t_k`, where `t_k = max(0, cos(d_k, d_0))`. Any
number of sites may lie as long as the trusted one does not. The sites' weights do not count.

Where we differ: in the paper the server trains on a small clean set of its own. Our server has no training data, so the
trusted update is that of a *site* which the operator names. It takes part in the sum too, with trust 1, so the sum is never
empty. A trusted site with unusual data ignores honest sites whose updates are at right angles to its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedllm.errors import UpdateError, explain
from fedllm.update import Contribution
from strategies.robust.judged import Verdict, measured_norms, measured_shares
from strategies.robust.space import Space, cosines, norms, scales_to


@dataclass(frozen=True)
class FLTrust:
    """Trust by the angle to one site's update.

    Args:
        trusted_site: The site's name.
    """

    trusted_site: str

    def judge(self, space: Space, contributions: Sequence[Contribution]) -> Verdict:
        """Give every site its trust, and the trusted update's length."""
        reference = self._reference(contributions)
        trust = np.maximum(0.0, cosines(space, reference))
        trust[reference] = 1.0
        growth = space.growth()
        lengths = norms(growth)
        scales = scales_to(growth, float(lengths[reference]))
        scales[reference] = 1.0
        shares = trust / trust.sum()
        measured = {"trust_mean": float(trust.mean()), "norm_trusted": float(lengths[reference])}
        measured |= measured_norms(lengths) | measured_shares(contributions, shares)
        return Verdict(shares, scales, measured)

    def _reference(self, contributions: Sequence[Contribution]) -> int:
        sites = [contribution.site for contribution in contributions]
        if self.trusted_site not in sites:
            raise UpdateError(
                explain(
                    "the update of the trusted site is missing",
                    expected=self.trusted_site,
                    found=", ".join(sites),
                    where="strategy.trusted_site",
                )
            )
        return sites.index(self.trusted_site)
