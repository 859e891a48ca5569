"""Who takes part in a round."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedllm import rng


@dataclass(frozen=True)
class UniformSampler:
    """A uniform sample without replacement of a share of the joined sites; a share of 1 takes all.

    Args:
        seed: The run's seed.
        fraction: Share of the joined sites, in (0, 1].
        min_sites: Fewest sites to ask, where so many have joined.
        over_selection: Ask this many times more, since some will not reply in time; at least 1.
    """

    seed: int
    fraction: float
    min_sites: int
    over_selection: float

    def select(self, sites: Sequence[str], round_: int, attempt: int) -> tuple[str, ...]:
        """Choose among the joined sites' names; the order of `sites` does not matter."""
        ordered = sorted(sites)
        num_asked = min(len(ordered), math.ceil(self.num_wanted(len(ordered)) * self.over_selection))
        draw = rng.generator(self.seed, round_, purpose=f"sampling/{attempt}")
        chosen = draw.choice(len(ordered), size=num_asked, replace=False)
        return tuple(ordered[index] for index in sorted(chosen))

    def num_wanted(self, num_sites: int) -> int:
        """Return how many replies close the round early."""
        return min(num_sites, max(self.min_sites, math.ceil(self.fraction * num_sites)))
