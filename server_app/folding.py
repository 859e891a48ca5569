"""From a round's accepted updates to the next state: how updates reach an aggregation.

They are folded in the order of the sites' names and read from their spooled files tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from fedllm.messages import TrainReport
from fedllm.update import Contribution
from server_app.arrivals import Arrivals
from server_app.broadcast import Start
from server_app.checkpoint import RunState
from server_app.groups import divided
from strategies.slots import Measurements, Origin, Strategy, UpdateSource
from strategies.weights import Cut, bounded, cut, heeds_weights


@dataclass(frozen=True)
class Accepted:
    """A usable reply.

    Attributes:
        site: Whose it is.
        report: Its account.
        payload: Its update.
        num_bytes: Size of that.
        arriving: What opens it; of a late reply, that of the round in which the site was asked.
    """

    site: str
    report: TrainReport
    payload: Path
    num_bytes: int
    arriving: Arrivals

    @property
    def start(self) -> Start:
        """What the site trained from."""
        return self.arriving.starts[self.site]

    @property
    def rank(self) -> int:
        """How many components of a LoRA adapter the site trained, 0 for all."""
        return self.arriving.ranks[self.site]

    @property
    def claim(self) -> float:
        """What the site says it weighs."""
        report, weighting = self.report, self.arriving.config.strategy.weighting
        return float({"examples": report.num_examples, "tokens": report.num_tokens, "uniform": 1}[weighting])


def grouped(strategy: Strategy, state: RunState, accepted: Mapping[str, Accepted]) -> tuple[RunState, Measurements]:
    """Return the state that the round's updates move, divided between groups if this is the round that finds them."""
    grouping, round_ = strategy.grouping, state.round + 1
    if grouping is None or not grouping.is_due(round_):
        return state, {}
    with ExitStack() as opened:
        updates = {site: opened.enter_context(_opened(reply)) for site, reply in accepted.items()}
        groups, measured = grouping.groups(updates, strategy.work.at(round_).sent(state.layout))
    return divided(state, groups), measured


def moved(
    strategy: Strategy, current: Start, accepted: Mapping[str, Accepted], num_sites: int
) -> tuple[RunState, Measurements]:
    """Fold the updates of one group of sites and move its current state along the result.

    A spooled update is closed and deleted as soon as it is folded, or where the aggregation reads it again, at the end.

    Args:
        strategy: Aggregates and moves.
        current: Where the group stands, and that as sites decode it.
        accepted: The group's updates by site, which may be none.
        num_sites: Sites that have joined the federation.

    Raises:
        UpdateError: The updates cannot be aggregated.
    """
    state, received, round_ = current.state, current.broadcast.arrays, current.state.round + 1
    if not accepted:
        return replace(state, round=round_, sent=received, moved=()), {}
    origin = Origin(round_, state.layout, state.params, received, num_sites)
    aggregation = strategy.aggregator.start(strategy.work.at(round_).sent(state.layout), origin)
    weights = _weights(accepted)
    with ExitStack() as kept:
        for site in sorted(accepted):
            reply, staleness = accepted[site], state.round - accepted[site].start.state.round
            kept.callback(reply.payload.unlink, missing_ok=True)
            update = kept.enter_context(_opened(reply))
            losses = {} if reply.report.loss is None else {"loss": reply.report.loss}
            aggregation.fold(update, Contribution(site, weights[site], losses, reply.rank, staleness))
            if not aggregation.reads_until_finish:
                kept.close()
        delta, measured = aggregation.finish()
    params, optimizer = strategy.optimizer.apply(state.optimizer, state.params, delta)
    after = replace(state, round=round_, params=params, sent=received, optimizer=optimizer, moved=tuple(delta))
    return after, measured


def cuts(accepted: Mapping[str, Accepted]) -> tuple[Cut, ...]:
    """Return the sites of one group that count less than they claim."""
    return cut({site: reply.claim for site, reply in accepted.items()}, _weights(accepted))


def _weights(accepted: Mapping[str, Accepted]) -> dict[str, float]:
    """Return what the sites of one group weigh."""
    claims = {site: reply.claim for site, reply in accepted.items()}
    if not accepted:
        return claims
    config = next(iter(accepted.values())).arriving.config
    return bounded(claims, config.strategy.max_weight_share) if heeds_weights(config) else claims


@contextmanager
def _opened(reply: Accepted) -> Iterator[UpdateSource]:
    """Open an accepted update as one of the federation's tensors and shapes."""
    with reply.arriving.open(reply.payload, reply.report) as payload:
        yield reply.arriving.in_full(payload, reply.report)
