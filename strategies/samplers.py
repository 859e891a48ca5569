"""Who takes part in a round.

Draws are derived from the run's seed, so that a resumed run asks the same sites. Whoever knows the seed knows them too:
privacy amplification by sampling can be claimed only where the seed stays secret.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedllm import rng
from fedllm.config import RunConfig
from strategies.slots import Sampler


def build_sampler(config: RunConfig) -> Sampler:
    """Turn the rounds section into a sampler."""
    rounds = config.rounds
    if rounds.sampler == "all":
        return AllSampler()
    if rounds.sampler == "poisson":
        return PoissonSampler(config.seed, rounds.fraction)
    is_weighted = rounds.sampler == "weighted"
    return ShareSampler(config.seed, rounds.fraction, rounds.min_sites, rounds.over_selection, is_weighted)


@dataclass(frozen=True)
class AllSampler:
    """Every joined site, in every round."""

    def select(self, sites: Mapping[str, int], round_: int, attempt: int) -> tuple[str, ...]:  # noqa: ARG002
        """Return all."""
        return tuple(sorted(sites))

    def num_wanted(self, num_sites: int) -> int:
        """Return how many replies close the round early."""
        return num_sites


@dataclass(frozen=True)
class PoissonSampler:
    """Each joined site for itself, with the same probability: what the theory of private sampling assumes.

    A round may then have any number of sites, none included; one below the quorum is drawn again.

    Args:
        seed: The run's seed.
        probability: In (0, 1].
    """

    seed: int
    probability: float

    def select(self, sites: Mapping[str, int], round_: int, attempt: int) -> tuple[str, ...]:
        """Choose among the joined sites; a site's own draw does not depend on who else has joined."""
        return tuple(site for site in sorted(sites) if self._draw(site, round_, attempt) < self.probability)

    def num_wanted(self, num_sites: int) -> int:
        """Return how many replies close the round early: all that were asked."""
        return num_sites

    def _draw(self, site: str, round_: int, attempt: int) -> float:
        return float(rng.generator(self.seed, round_, site, f"sampling/{attempt}").random())


@dataclass(frozen=True)
class ShareSampler:
    """A sample without replacement of a share of the joined sites; a share of 1 takes all.

    Where the draw counts examples, the average should not count them again: combine it with
    ``strategy.weighting = "uniform"``.

    Args:
        seed: The run's seed.
        fraction: Share of the joined sites, in (0, 1].
        min_sites: Fewest sites to ask, where so many have joined.
        over_selection: Ask this many times more, since some will not reply in time; at least 1.
        is_weighted: Draw site after site with probabilities that are proportional to their examples, not alike.
    """

    seed: int
    fraction: float
    min_sites: int
    over_selection: float
    is_weighted: bool = False

    def select(self, sites: Mapping[str, int], round_: int, attempt: int) -> tuple[str, ...]:
        """Choose among the joined sites; their order does not matter."""
        ordered = sorted(sites)
        num_asked = min(len(ordered), math.ceil(self.num_wanted(len(ordered)) * self.over_selection))
        draw = rng.generator(self.seed, round_, purpose=f"sampling/{attempt}")
        chosen = draw.choice(len(ordered), size=num_asked, replace=False, p=self._probabilities(sites))
        return tuple(ordered[index] for index in sorted(chosen))

    def num_wanted(self, num_sites: int) -> int:
        """Return how many replies close the round early."""
        return min(num_sites, max(self.min_sites, math.ceil(self.fraction * num_sites)))

    def _probabilities(self, sites: Mapping[str, int]) -> list[float] | None:
        if not self.is_weighted:
            return None
        sizes = np.array([max(1, sites[site]) for site in sorted(sites)], np.float64)
        return list(sizes / sizes.sum())
