"""The four slots of a strategy, and what passes between them.

A federated algorithm is four independent choices (the decomposition of TensorFlow Federated and FedJAX):

- **sampler**: which sites are asked in a round;
- **client work**: what a site optimises and which tensors it trains;
- **aggregator**: how the updates of a round become one delta;
- **server optimizer**: how the global adapter moves along that delta.

Each slot is a value without hidden state: what must survive a restart goes in and comes out as a plain mapping.
Sign convention: ``delta = trained - received``, so the server moves *along* the delta.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedllm.update import Arrays, Contribution, Layout
from fedllm.work import ClientWork

Measurements = Mapping[str, float]
"""Small named numbers that a slot reports for people to look at."""


Accumulator = NDArray[np.float64]
"""A running sum in float64."""


class UpdateSource(Protocol):
    """An update that can be read tensor by tensor, from memory or from a spooled file."""

    @property
    def is_partial(self) -> bool:
        """Whether the update says nothing about some coordinates."""

    def read(self, name: str) -> NDArray[np.float32]:
        """Return one tensor of the delta in the layout's shape, zero where nothing was sent."""

    def add_to(self, name: str, accumulator: Accumulator, weight: float, weights: Accumulator | None = None) -> None:
        """Add `weight` times one tensor to an accumulator, and `weight` to `weights` where something was sent."""


@dataclass(frozen=True)
class ArraySource:
    """An :class:`UpdateSource` over whole arrays in memory."""

    arrays: Mapping[str, NDArray[np.float32]]

    @property
    def is_partial(self) -> bool:
        """Nothing is left out."""
        return False

    def read(self, name: str) -> NDArray[np.float32]:
        """Return one tensor."""
        return self.arrays[name]

    def add_to(self, name: str, accumulator: Accumulator, weight: float, weights: Accumulator | None = None) -> None:
        """Add one tensor."""
        accumulator += weight * self.arrays[name].astype(np.float64)
        if weights is not None:
            weights += weight


class Sampler(Protocol):
    """Which sites are asked to train in a round."""

    def select(self, sites: Mapping[str, int], round_: int, attempt: int) -> tuple[str, ...]:
        """Choose among the joined sites, given as training examples by name; equal arguments give an equal choice."""

    def num_wanted(self, num_sites: int) -> int:
        """Return how many usable replies close a round early, of so many joined sites."""


class WorkPlan(Protocol):
    """What a site does in each round."""

    def at(self, round_: int) -> ClientWork:
        """Return the work of a round, from 1; it travels to the site as it is."""


class Aggregation(Protocol):
    """One round's running aggregate.

    Most rules are sums: they read an update once, in :meth:`fold`, and memory does not grow with the number of updates.
    Rules that look at all updates together (medians, distances) say so with ``reads_until_finish``: :meth:`fold` then
    only notes the update, and :meth:`finish` reads the spooled files tensor by tensor, as often as it likes, so that it
    holds one tensor of every update at a time and never a whole one.
    """

    @property
    def reads_until_finish(self) -> bool:
        """Whether updates are read after their fold; the caller keeps them open until :meth:`finish` has returned.

        The answer is the same for the whole round. A wrapper passes on what its inner aggregation says.
        """

    def fold(self, update: UpdateSource, contribution: Contribution) -> None:
        """Take one usable update in, at most one of a site."""

    def finish(self) -> tuple[Arrays, Measurements]:
        """Return the aggregated delta and what was measured.

        Raises:
            UpdateError: No delta can be made of these updates; the round is tried again.
            AssertionError: Nothing was folded.
        """


@dataclass(frozen=True)
class Origin:
    """Where a round's updates start from; nothing in it is to be changed.

    Attributes:
        round: The round that is aggregated, from 1.
        layout: All tensors of the adapter, of which an update may hold some.
        params: The global adapter that the delta will be added to.
        received: The same bit for bit as the sites decoded it, which a lossy downlink makes another thing.
        num_sites: Sites that have joined, whether or not they take part in this round.
    """

    round: int
    layout: Layout
    params: Arrays
    received: Arrays
    num_sites: int = 0


class Aggregator(Protocol):
    """How updates become one delta."""

    def start(self, layout: Layout, origin: Origin) -> Aggregation:
        """Begin the aggregate of a round.

        Args:
            layout: The tensors that the updates hold.
            origin: Where they start from.
        """


@dataclass(frozen=True)
class OptimizerState:
    """What a server optimizer remembers between rounds.

    A round may move some of the tensors only; what is remembered of the others stays as it is.

    Attributes:
        step: Rounds applied so far.
        moments: Arrays by moment name (``"m"``, ``"v"``) and tensor, of the tensors that have moved.
        counts: Rounds applied so far to each tensor that has moved.
    """

    step: int = 0
    moments: Mapping[str, Arrays] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)

    def after(self, delta: Arrays, moments: Mapping[str, Arrays] | None = None) -> OptimizerState:
        """Return the state after a round that moved the tensors of `delta`, with their new moments."""
        kept = {moment: {**self.moments.get(moment, {}), **arrays} for moment, arrays in (moments or {}).items()}
        counts = {name: self.counts.get(name, 0) + 1 for name in delta}
        return OptimizerState(self.step + 1, kept, {**self.counts, **counts})


class ServerOptimizer(Protocol):
    """How the global adapter moves along the aggregated delta."""

    def apply(self, state: OptimizerState, params: Arrays, delta: Arrays) -> tuple[Arrays, OptimizerState]:
        """Move the tensors that `delta` holds; the arguments are left as they are.

        Args:
            state: What was remembered.
            params: The global adapter, or the tensors of it that `delta` holds.
            delta: The aggregated delta of some or all tensors.

        Returns:
            `params` with those tensors moved, and the next state.
        """


class Grouping(Protocol):
    """Which sites share a global adapter, where not all of them do."""

    def is_due(self, round_: int) -> bool:
        """Tell whether the groups are found from this round's updates; so it is in one round at most."""

    def groups(self, updates: Mapping[str, UpdateSource], layout: Layout) -> tuple[dict[str, int], Measurements]:
        """Return each site's group and what was measured; groups are numbered from 0, the largest, without gaps.

        Args:
            updates: By site, all from the same start.
            layout: The tensors that they hold.
        """


@dataclass(frozen=True)
class Buffer:
    """When the server moves without waiting for all sites.

    Attributes:
        size: Updates that it moves along at a time.
        max_staleness: An update that is later than this many versions is dropped.
    """

    size: int
    max_staleness: int


@dataclass(frozen=True)
class Strategy:
    """One choice for each slot, under the algorithm's name.

    Attributes:
        grouping: Divides the sites into groups with a global adapter each; None leaves all together. The other slots then
            work in each group by itself.
        side_rank: Rank of the side factors that the global state needs (:mod:`fedllm.lora.pairs`), 0 for none.
        num_heads: Matrices between the factors that it needs (:mod:`fedllm.lora.heads`), 0 for none.
        is_exact: With the plain server optimizer, what sites apply after a round is the weighted mean of what they
            applied at its end, scales inside, as far as side factors hold it. A contract test holds strategies to it.
        buffer: Makes the federation asynchronous; None has rounds that all start from one state.
    """

    name: str
    sampler: Sampler
    work: WorkPlan
    aggregator: Aggregator
    optimizer: ServerOptimizer
    grouping: Grouping | None = None
    side_rank: int = 0
    num_heads: int = 0
    is_exact: bool = False
    buffer: Buffer | None = None
