"""Held-out scores: of the global state at every site, of each site's own training, and of a central set if there is one."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fedllm.messages import (
    AnyMessage,
    EvaluateInstruction,
    EvaluateReport,
    Failure,
    LocalOnlyInstruction,
    LocalOnlyReport,
    PersonaliseInstruction,
    PersonaliseReport,
    Score,
    StateInstruction,
)
from server_app.broadcast import Start
from server_app.central import central_score
from server_app.checkpoint import RunState
from server_app.dialogue import Dialogue
from server_app.exchange import Deadline
from server_app.federation import Federation
from server_app.roster import Member

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scores:
    """Held-out scores of one state.

    Attributes:
        sites: Score by site.
    """

    sites: Mapping[str, Score]

    @property
    def loss(self) -> float:
        """Mean loss over the held-out target tokens of all sites, in nats."""
        return self._mean([score.loss for score in self.sites.values()])

    @property
    def accuracy(self) -> float:
        """Share of the held-out target tokens of all sites that are ranked first."""
        return self._mean([score.accuracy for score in self.sites.values()])

    @property
    def worst_site(self) -> str:
        """The site with the highest loss."""
        return max(sorted(self.sites), key=lambda site: self.sites[site].loss)

    def _mean(self, values: list[float]) -> float:
        tokens = [score.num_tokens for score in self.sites.values()]
        return math.fsum(value * count for value, count in zip(values, tokens, strict=True)) / sum(tokens)

    def rows(self) -> dict[str, dict[str, float]]:
        """Return the scores as plain numbers."""
        fields = ("loss", "accuracy", "num_tokens", "num_examples")
        return {site: {name: getattr(score, name) for name in fields} for site, score in sorted(self.sites.items())}


def evaluate(federation: Federation, state: RunState) -> Scores | None:
    """Have every site evaluate the global state of its group, and record it; None if no site could."""
    started, sites = time.monotonic(), federation.roster.available()
    starts = federation.broadcaster.starts(state, sites)
    poll = _Poll(federation, starts, state.round, EvaluateInstruction, {"round": state.round})
    replies = poll.ask(sites, federation.config.rounds.deadline_s)
    reports = {site: message for site, message in replies.items() if isinstance(message, EvaluateReport)}
    scores = Scores({site: report.score for site, report in reports.items()})
    if not scores.sites:
        log.warning("no site could evaluate round %d", state.round)
        return None
    federation.recorder.record(
        {
            "event": "evaluation",
            "round": state.round,
            "sites": scores.rows(),
            "loss": scores.loss,
            "accuracy": scores.accuracy,
            "worst_site": scores.worst_site,
            "worst_loss": scores.sites[scores.worst_site].loss,
            "attack_success": _attack_success(reports.values()),
            "central": central_score(federation.config, federation.home, state),
            "bytes_down": poll.bytes_down,
            "seconds": time.monotonic() - started,
        }
    )
    return scores


def _attack_success(reports: Iterable[EvaluateReport]) -> float | None:
    """Return the share of all sites' held-out questions at which a simulated backdoor opens, None without one."""
    rows = [(one.attack_success, one.score.num_examples) for one in reports if one.attack_success is not None]
    whole = sum(count for _, count in rows)
    return math.fsum(share * count for share, count in rows) / whole if rows else None


def ask_prompt(federation: Federation, state: RunState) -> None:
    """Have one site answer the prompt with the base and with the final adapter, and record it."""
    prompt = federation.config.evaluation.prompt
    if not prompt:
        return
    first = dict(list(federation.roster.available().items())[:1])
    fields = {"round": state.round, "prompt": prompt}
    poll = _Poll(federation, federation.broadcaster.starts(state, first), state.round, EvaluateInstruction, fields)
    for site, message in poll.ask(first, federation.config.rounds.deadline_s).items():
        if isinstance(message, EvaluateReport):
            answers = {"base": message.answer_base, "federated": message.answer}
            federation.recorder.record({"event": "answer", "prompt": prompt, "site": site, **answers})


def local_only(federation: Federation, state: RunState) -> None:
    """Have every site train alone from the first state for the federation's steps, and record its score."""
    started, sites = time.monotonic(), federation.roster.available()
    starts = dict.fromkeys(sites, Start(state, federation.broadcaster.initial(state)))
    poll = _Poll(federation, starts, state.round, LocalOnlyInstruction, {"num_steps": federation.config.total_steps})
    patience_s = federation.config.rounds.deadline_s * federation.config.num_rounds
    replies = poll.ask(sites, patience_s)
    scores = Scores({site: message.score for site, message in replies.items() if isinstance(message, LocalOnlyReport)})
    if scores.sites:
        rows, seconds = scores.rows(), time.monotonic() - started
        federation.recorder.record({"event": "local_only", "sites": rows, "loss": scores.loss, "seconds": seconds})


def personalised(federation: Federation, state: RunState) -> None:
    """Have every site make its own adapter from the last state, and record how it does beside the global one.

    Nothing is asked where the strategy keeps nothing at the sites and no further steps are wished.
    """
    started, num_steps = time.monotonic(), federation.config.evaluation.personal_steps
    work = federation.strategy.work.at(max(1, state.round))
    if not num_steps and not work.kept(state.adapter_layout).tensors:
        return
    fields, sites = {"round": state.round, "num_steps": num_steps}, federation.roster.available()
    poll = _Poll(federation, federation.broadcaster.starts(state, sites), state.round, PersonaliseInstruction, fields)
    messages = poll.ask(sites, federation.config.rounds.deadline_s).items()
    reports = {site: message for site, message in messages if isinstance(message, PersonaliseReport)}
    if not reports:
        return
    own = Scores({site: report.personalised for site, report in reports.items()})
    common = Scores({site: report.federated for site, report in reports.items()})
    federation.recorder.record(
        {
            "event": "personalised",
            "num_steps": num_steps,
            "sites": {site: {**row, "federated": common.sites[site].loss} for site, row in own.rows().items()},
            "loss": own.loss,
            "federated": common.loss,
            "seconds": time.monotonic() - started,
        }
    )


class _Poll:
    """One question about a state to several sites, without updates.

    Args:
        federation: What the phases share.
        starts: The state to send, by site.
        round_: The round after which it is asked.
        kind: Class of the instruction.
        fields: Its own fields.
    """

    def __init__(
        self,
        federation: Federation,
        starts: Mapping[str, Start],
        round_: int,
        kind: type[EvaluateInstruction] | type[LocalOnlyInstruction] | type[PersonaliseInstruction],
        fields: Mapping[str, object],
    ) -> None:
        self._federation, self._starts, self._round = federation, starts, round_
        self._kind, self._fields = kind, fields
        self.bytes_down = 0

    def ask(self, sites: Mapping[str, Member], timeout_s: float) -> dict[str, AnyMessage]:
        """Return the answers by site; failures are logged and left out."""
        federation, round_ = self._federation, self._round
        federation.transport.open_round(round_)
        try:
            dialogue = Dialogue(federation, self._starts, round_, self._make, with_update=False)
            answers = {site: reply.message for site, reply in dialogue.ask(sites, Deadline(timeout_s))}
        finally:
            federation.transport.close_round(round_)
        self.bytes_down = dialogue.bytes_down
        for site, message in answers.items():
            if isinstance(message, Failure):
                log.warning("%s could not do what was asked: %s: %s", site, message.error, message.reason)
        return answers

    def _make(self, site: str, common: Mapping[str, object]) -> StateInstruction:  # noqa: ARG002
        work = self._federation.strategy.work.at(max(1, self._round))
        return self._kind.model_validate({**common, "work": work, **self._fields})
