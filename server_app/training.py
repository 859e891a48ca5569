"""One round of training: choose, broadcast, collect, aggregate.

A reply is taken only when it is whole: its report is checked, its payload verified tensor by tensor, and only then folded.
A bad one (an error, a wrong shape, NaN, another round, too late) is named, counted and dropped, and changes no bit of the
aggregate.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field

from fedllm.errors import FedLLMError, TransportError, UpdateError, explain
from fedllm.messages import Failure, TrainInstruction, TrainReport
from fedllm.work import ClientWork
from server_app.arrivals import Arrivals, arrivals
from server_app.broadcast import Start
from server_app.checkpoint import RunState
from server_app.dialogue import Dialogue
from server_app.events import LATE, SILENT, Rejection
from server_app.exchange import Deadline, Reply
from server_app.federation import Federation, Stopwatch
from server_app.folding import Accepted, cuts, grouped, moved
from server_app.groups import by_group, joined, measured_together
from server_app.pruning import check_next_rank, ranks_of
from server_app.roster import Member
from strategies.parts import check_length
from strategies.weights import Cut

log = logging.getLogger(__name__)


@dataclass
class Harvest:
    """What came back in one attempt at a round.

    Attributes:
        accepted: Usable replies by site.
        rejected: Why there is none, by site.
    """

    accepted: dict[str, Accepted] = field(default_factory=dict)
    rejected: dict[str, Rejection] = field(default_factory=dict)

    def reject(self, site: str, kind: str, reason: str) -> None:
        """Drop a reply, with the reason and what kind of reason it is."""
        log.warning("rejected the update of %s: %s", site, reason)
        self.rejected[site] = Rejection(site=site, reason=reason, kind=kind)


@dataclass(frozen=True)
class Outcome:
    """What became of the updates of one attempt.

    Attributes:
        moved: The state after the round, None if nothing changed.
        measured: What the aggregator measured.
        reason: Why they could not be aggregated, empty where they could, or where they were too few.
        cut: Sites that counted less than they claim.
    """

    moved: RunState | None
    measured: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""
    cut: tuple[Cut, ...] = ()


def train_round(federation: Federation, state: RunState, round_: int, attempt: int) -> RunState | None:
    """Run one attempt at a round.

    Args:
        federation: What the phases share.
        state: The state after the round before.
        round_: The round, from 1.
        attempt: The attempt, from 1.

    Returns:
        The state after the round, or None if there was no quorum; the attempt is recorded either way.
    """
    watch = Stopwatch()
    with watch.phase("select"):
        chosen = _select(federation, round_, attempt)
    federation.transport.open_round(round_)
    try:
        with watch.phase("broadcast"):
            starts = federation.broadcaster.starts(state, chosen)
        dialogue = training_dialogue(federation, starts, round_, attempt)
        arriving = arrivals(federation, state, starts, round_)
        with watch.phase("train"):
            harvest = _collect(federation, arriving, chosen, dialogue)
        outcome = Outcome(None)
        if len(harvest.accepted) >= federation.config.rounds.min_sites:
            with watch.phase("aggregate"):
                outcome = aggregate(federation, state, harvest.accepted)
    finally:
        federation.transport.close_round(round_)
    federation.recorder.record(round_event(harvest, round_, attempt, chosen, watch, outcome, dialogue.bytes_down))
    if outcome.moved is not None and outcome.moved.groups != state.groups:
        federation.recorder.record(_grouping_event(outcome))
    return outcome.moved


def _select(federation: Federation, round_: int, attempt: int) -> dict[str, Member]:
    federation.roster.admit()
    available = federation.roster.available()
    sizes = {name: member.introduction.data.num_train_examples for name, member in available.items()}
    names = federation.strategy.sampler.select(sizes, round_, attempt) if available else ()
    return {name: available[name] for name in names}


def training_dialogue(
    federation: Federation,
    starts: Mapping[str, Start],
    round_: int,
    attempt: int = 1,
    *,
    window: int | None = None,
    taken: Callable[[str], int] = lambda _: 0,
) -> Dialogue:
    """Return the question to train from these states.

    Args:
        federation: What the phases share.
        starts: States by site.
        round_: The round.
        attempt: The attempt.
        window: The transport's number of the round, None for the round's own.
        taken: Returns the round of a site's update that is accepted but not folded yet, 0 where there is none.
    """
    work, order = federation.strategy.work.at(round_), sorted(starts)
    folded, ranks = _last_folded(federation, work), ranks_of(federation) if work.pruning < 1 else {}

    def make(site: str, common: Mapping[str, object]) -> TrainInstruction:
        return TrainInstruction.model_validate(
            {
                **common,
                "round": round_,
                "attempt": attempt,
                "last_folded": max(folded.get(site, 0), taken(site)),
                "site_index": order.index(site),
                "num_sites": len(order),
                "first_step": (round_ - 1) * federation.config.train.local_steps,
                "rank": ranks.get(site, 0),
                "work": work,
            }
        )

    return Dialogue(federation, starts, round_ if window is None else window, make, with_update=True)


def _last_folded(federation: Federation, work: ClientWork) -> dict[str, int]:
    """Return the last round of this work that each site trained in and whose update was folded."""
    works = federation.strategy.work
    rounds = [event for event in federation.recorder.events if event["event"] == "round"]
    alike = [event for event in rounds if works.at(event["round"]) == work]
    return {
        site: event["round"] - event["sites"].get(site, {}).get("staleness", 0)
        for event in alike
        for site in event["participants"]
    }


def _collect(federation: Federation, arriving: Arrivals, chosen: Mapping[str, Member], dialogue: Dialogue) -> Harvest:
    """Take replies as they come until enough are usable, all came, or the time is over.

    With a grace period, the time is over so many seconds after the quorum is there.
    """
    harvest, rounds = Harvest(), federation.config.rounds
    deadline = Deadline(rounds.deadline_s)
    wanted = federation.strategy.sampler.num_wanted(len(federation.roster.available()) or len(chosen))
    for site, reply in dialogue.ask(chosen, deadline):
        take(federation, arriving, harvest, reply, site, window=arriving.round)
        if len(harvest.accepted) >= min(wanted, len(chosen)) < len(chosen):
            break
        if rounds.grace_s and len(harvest.accepted) >= rounds.min_sites:
            deadline.cut(rounds.grace_s)
    for site in sorted(set(chosen) - set(harvest.accepted) - set(harvest.rejected)):
        harvest.reject(site, SILENT, "no reply before the round closed")
    for late in federation.exchange.late():
        site = federation.roster.name_of(late.node)
        if site not in harvest.rejected:
            harvest.reject(site, LATE, "it answered an earlier round after that had closed")
    return harvest


def take(federation: Federation, arriving: Arrivals, harvest: Harvest, reply: Reply, site: str, *, window: int) -> None:
    """Check one reply to the request to train, and note it as accepted or rejected.

    Args:
        federation: What the phases share.
        arriving: What opens the updates of the round in which the site was asked.
        harvest: Where to note it.
        reply: The reply.
        site: Whose it is.
        window: The transport's number of that round.
    """
    try:
        report = _checked_report(reply, site, arriving.round)
        adapter, fewest = arriving.starts[site].state.layout, federation.config.adapter.min_virtual_tokens
        check_length(adapter, report.num_virtual_tokens, fewest)
        check_next_rank(federation.config, arriving.work, report, arriving.ranks[site])
        path = federation.transport.receive(round_=window, site=site, reply=reply.envelope)
        with arriving.open(path, report) as payload:
            payload.verify()
            harvest.accepted[site] = Accepted(site, report, path, payload.num_bytes, arriving)
    except FedLLMError as error:
        kind = reply.message.error if isinstance(reply.message, Failure) else type(error).__name__
        harvest.reject(site, kind, f"{type(error).__name__}: {error}")


def _checked_report(reply: Reply, site: str, round_: int) -> TrainReport:
    """Return the report, if it is one, of this site and this round.

    Raises:
        TransportError: It is not.
        UpdateError: The site could not train.
    """
    message = reply.message
    if isinstance(message, Failure):
        raise UpdateError(f"{message.error}: {message.reason}")
    if not isinstance(message, TrainReport):
        raise TransportError(explain("a site answered something else", expected="trained", found=message.kind))
    if (message.site, message.round) != (site, round_):
        raise TransportError(
            explain(
                "a site's report is not for this request",
                expected=f"{site!r} round {round_}",
                found=f"{message.site!r} round {message.round}",
            )
        )
    return message


def aggregate(federation: Federation, state: RunState, accepted: Mapping[str, Accepted]) -> Outcome:
    """Move the global state of every group along its sites' updates, after finding the groups where that is due."""
    broadcasts = [federation.broadcaster.prepare(branch) for branch in state.branches]
    try:
        state, found = grouped(federation.strategy, state, accepted)
        broadcasts *= len(state.branches) // len(broadcasts)  # new groups stand where all stood
        results = [
            moved(federation.strategy, Start(branch, broadcasts[branch.group]), sent, len(federation.roster.members))
            for branch, sent in by_group(state, accepted)
        ]
    except UpdateError as error:
        log.warning("the updates cannot be aggregated: %s", error)
        return Outcome(None, reason=str(error))
    finally:
        for reply in accepted.values():
            reply.payload.unlink(missing_ok=True)
    measured = measured_together([measured for _, measured in results])
    less = tuple(one for _, sent in by_group(state, accepted) for one in cuts(sent))
    return Outcome(joined(state, [branch for branch, _ in results]), {**measured, **found}, cut=less)


def round_event(
    harvest: Harvest,
    round_: int,
    attempt: int,
    chosen: Iterable[str],
    watch: Stopwatch,
    outcome: Outcome,
    bytes_down: int,
) -> dict[str, object]:
    """Return what is written down about an attempt."""
    accepted = dict(sorted(harvest.accepted.items()))
    reports = {site: reply.report for site, reply in accepted.items()}
    return {
        "event": "round" if outcome.moved is not None else "attempt",
        "round": round_,
        "attempt": attempt,
        "participants": sorted(harvest.accepted),
        "asked": sorted(chosen),
        "rejected": [part.model_dump() for _, part in sorted(harvest.rejected.items())],
        "train_loss": _mean_loss(reports.values()),
        "sites": {
            site: {**_site_numbers(report), "staleness": round_ - report.round, "rank": accepted[site].rank}
            for site, report in reports.items()
        },
        "reason": outcome.reason,
        "cut": [asdict(one) for one in outcome.cut],
        "update_norm": outcome.measured.get("delta_norm"),
        "discarded_energy": outcome.measured.get("discarded_energy"),
        "measurements": dict(outcome.measured),
        "bytes_up": sum(reply.num_bytes for reply in harvest.accepted.values()),
        "bytes_down": bytes_down,
        "phases": watch.phases,
        "seconds": watch.seconds,
    }


def _grouping_event(outcome: Outcome) -> dict[str, object]:
    assert outcome.moved is not None, "groups belong to a state"
    silhouette = outcome.measured.get("silhouette", math.nan)
    groups = dict(sorted(outcome.moved.groups.items()))
    return {"event": "groups", "round": outcome.moved.round, "groups": groups, "silhouette": silhouette}


def _mean_loss(reports: Iterable[TrainReport]) -> float | None:
    rows = [(report.loss, report.num_tokens) for report in reports if report.loss is not None]
    total = sum(tokens for _, tokens in rows)
    return math.fsum(loss * tokens for loss, tokens in rows) / total if total else None


def _site_numbers(report: TrainReport) -> dict[str, object]:
    return {
        "loss": math.nan if report.loss is None else report.loss,
        "weight": report.num_examples,
        "num_tokens": report.num_tokens,
        "num_steps": report.num_steps,
        "grad_norm": report.grad_norm,
        "residual_norm": report.residual_norm,
        "next_rank": report.next_rank,
        "note": report.note,
        "seconds": report.seconds,
        "phases": report.phases,
    }
