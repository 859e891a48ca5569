"""Rules that decide what each site's whole update counts, in front of any aggregator.

A rule looks at all updates of a round and gives every site a share of the aggregate and a factor on its delta. What then
happens with the updates is the inner aggregator's business, so a rule can stand in front of the mean, of another rule, or
of an aggregation of products, for which it is a filter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedllm.update import Arrays, Contribution, Layout
from strategies.robust.space import Space, SpaceOf, Vector
from strategies.slots import Accumulator, Aggregation, Aggregator, Measurements, Origin, UpdateSource


@dataclass(frozen=True)
class Verdict:
    """What each update counts.

    Attributes:
        shares: Weights [K] in the aggregate, not negative, with the sum 1; a site with share 0 is ignored.
        scales: Factors [K] on the deltas, not negative.
        measured: What people may want to see of it.
    """

    shares: Vector
    scales: Vector
    measured: Measurements


class SiteRule(Protocol):
    """Decides what each site's update counts."""

    def judge(self, space: Space, contributions: Sequence[Contribution]) -> Verdict:
        """Look at all updates; the order of the sites does not matter.

        Raises:
            UpdateError: The rule cannot do with these sites.
        """


@dataclass(frozen=True)
class Judged:
    """An aggregator of the updates that a rule lets pass, with the weights that it gives them.

    Args:
        rule: Decides.
        compare: Where updates are compared: on factors or on products.
        inner: Aggregates what is left.
    """

    rule: SiteRule
    compare: SpaceOf
    inner: Aggregator

    def start(self, layout: Layout, origin: Origin) -> Aggregation:
        """Begin the aggregate of a round."""
        return _Judging(self, layout, origin)


@dataclass
class _Judging:
    """Keeps the updates until all are there: one file each, not their arrays."""

    setup: Judged
    layout: Layout
    origin: Origin
    updates: list[UpdateSource] = field(default_factory=list)
    contributions: list[Contribution] = field(default_factory=list)
    reads_until_finish = True

    def fold(self, update: UpdateSource, contribution: Contribution) -> None:
        """Note an update."""
        self.updates.append(update)
        self.contributions.append(contribution)

    def finish(self) -> tuple[Arrays, Measurements]:
        """Judge, and aggregate what passes."""
        assert self.updates, "finish() needs at least one update"
        space = self.setup.compare(self.layout, self.origin.received, self.updates)
        verdict = self.setup.rule.judge(space, self.contributions)
        inner = self.setup.inner.start(self.layout, self.origin)
        rows = zip(self.updates, self.contributions, verdict.shares.tolist(), verdict.scales.tolist(), strict=True)
        for update, contribution, share, scale in rows:
            if share > 0:
                inner.fold(Scaled(update, scale) if scale != 1 else update, replace(contribution, weight=share))
        delta, measured = inner.finish()
        return delta, {**measured, **verdict.measured}  # of two rules, the first saw the updates as they came


@dataclass(frozen=True)
class Scaled:
    """An update with its delta multiplied by a factor."""

    update: UpdateSource
    factor: float

    @property
    def is_partial(self) -> bool:
        """Whether the update says nothing about some coordinates."""
        return self.update.is_partial

    def read(self, name: str) -> NDArray[np.float32]:
        """Return one tensor of the scaled delta."""
        return np.asarray(self.factor * self.update.read(name).astype(np.float64), np.float32)

    def add_to(self, name: str, accumulator: Accumulator, weight: float, weights: Accumulator | None = None) -> None:
        """Add one tensor of the scaled delta; the weights are those of the update as it is."""
        self.update.add_to(name, accumulator, weight * self.factor)
        if weights is not None:
            self.update.add_to(name, np.zeros_like(accumulator), weight, weights)


def weight_shares(contributions: Sequence[Contribution]) -> Vector:
    """Return the sites' own weights as shares [K]."""
    weights = np.array([contribution.weight for contribution in contributions])
    return np.asarray(weights / weights.sum())


def measured_shares(contributions: Sequence[Contribution], shares: Vector) -> dict[str, float]:
    """Tell whose updates count and whose are ignored."""
    used = int(np.count_nonzero(shares))
    by_site = {f"share/{one.site}": float(share) for one, share in zip(contributions, shares, strict=True)}
    return {"sites_used": used, "sites_ignored": len(shares) - used, **by_site}


def measured_norms(norms: Vector) -> dict[str, float]:
    """Tell how large the updates are."""
    return {"norm_min": float(norms.min()), "norm_median": float(np.median(norms)), "norm_max": float(norms.max())}
