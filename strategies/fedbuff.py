"""FedBuff: the server moves as soon as K updates are in, and no site waits for a slower one.

Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek, Huba, "Federated Learning with Buffered Asynchronous Aggregation", AISTATS
2022 (arXiv 2106.06639).

Sites are at work on whichever version of the state they were given last. An update that arrives tau versions later is a
delta to the version it was trained on; it joins the buffer scaled by ``s(tau) = (1 + tau)^-a``, with a = 1/2 as in the
paper, and the server moves along ``sum_k w_k s(tau_k) delta_k / sum_k w_k`` of K updates: the staleness is not in the
denominator, so a buffer of late updates makes a small step. With a buffer as large as the federation nobody is ever late,
and it is FedAvg.

Any strategy that averages can be buffered: `rounds.buffer_size` is K. Where we differ: weights w_k may be examples, the
paper's are equal; and a site works on a version once, so a fast one rests from its update until the server has moved.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedllm.config import RoundsConfig
from fedllm.update import Arrays, Contribution, Layout
from strategies.robust.judged import Scaled
from strategies.samplers import AllSampler
from strategies.slots import Aggregation, Aggregator, Buffer, Measurements, Origin, Strategy, UpdateSource


def buffered(strategy: Strategy, rounds: RoundsConfig) -> Strategy:
    """Return a strategy whose server moves every `rounds.buffer_size` updates; every free site is kept at work."""
    return replace(
        strategy,
        sampler=AllSampler(),
        aggregator=Discounted(strategy.aggregator, rounds.staleness_exponent),
        buffer=Buffer(rounds.buffer_size, rounds.max_staleness),
    )


@dataclass(frozen=True)
class Discounted:
    """Any aggregator, to which an update comes the smaller the later it is.

    Args:
        inner: What makes one delta of the updates.
        exponent: a in ``(1 + tau)^-a``.
    """

    inner: Aggregator
    exponent: float

    def start(self, layout: Layout, origin: Origin) -> Aggregation:
        """Begin the aggregate of a buffer."""
        return _Discounting(self.inner.start(layout, origin), self.exponent)


class _Discounting:
    def __init__(self, inner: Aggregation, exponent: float) -> None:
        self._inner, self._exponent, self._staleness = inner, exponent, list[int]()

    @property
    def reads_until_finish(self) -> bool:
        """As the inner one does."""
        return self._inner.reads_until_finish

    def fold(self, update: UpdateSource, contribution: Contribution) -> None:
        """Take an update in."""
        self._staleness.append(contribution.staleness)
        factor = (1 + contribution.staleness) ** -self._exponent
        self._inner.fold(Scaled(update, factor) if factor != 1 else update, contribution)

    def finish(self) -> tuple[Arrays, Measurements]:
        """Return the delta, and how late the updates were."""
        delta, measured = self._inner.finish()
        mean = sum(self._staleness) / len(self._staleness)
        return delta, {**measured, "staleness_mean": mean, "staleness_max": max(self._staleness)}
