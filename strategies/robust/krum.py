"""Trust the update that lies nearest to most others, or the mean of several such.

Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017 (the preprint is
arXiv 1703.02757): a site's score is the sum of its squared distances to the n - f - 2 updates nearest to it, out of n of
which at most f lie; Krum takes the update of smallest score, Multi-Krum the mean of the m = n - f - 2 smallest. The
guarantee needs n >= 2f + 3.

As in the paper, selected updates count the same whatever the sites' weights say. One update is taken, or the outermost
are left out: sites with rare data are ignored round after round, and Krum gives up the averaging of noise.

Where we differ: equal scores are decided by the sites' names, so that the order of replies does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedllm.update import Contribution
from strategies.robust.judged import Verdict, measured_norms, measured_shares
from strategies.robust.space import Block, Space, Vector, norms, squared_distances


@dataclass(frozen=True)
class Krum:
    """The most central update, or the mean of the most central ones.

    Args:
        num_byzantine: Sites that may lie, f.
        multi: Take n - f - 2 updates in place of one.
    """

    num_byzantine: int
    multi: bool = False

    def judge(self, space: Space, contributions: Sequence[Contribution]) -> Verdict:
        """Give the sites of smallest score equal shares."""
        count = len(contributions)
        num_near = max(1, count - self.num_byzantine - 2)
        scores = krum_scores(squared_distances(space), num_near)
        order = sorted(range(count), key=lambda row: (scores[row], contributions[row].site))
        chosen = order[: num_near if self.multi else 1]
        shares = np.zeros(count)
        shares[chosen] = 1 / len(chosen)
        measured = measured_norms(norms(space.growth())) | measured_shares(contributions, shares)
        return Verdict(shares, np.ones(count), measured)


def krum_scores(squared: Block, num_near: int) -> Vector:
    """Return every update's sum [K] of its `num_near` smallest squared distances [K, K] to others."""
    others = np.sort(squared + np.diag(np.full(len(squared), np.inf)), axis=1)[:, :-1]
    return np.asarray(others[:, :num_near].sum(axis=1))
