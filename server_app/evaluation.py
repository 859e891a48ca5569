"""Held-out scores: of the global state at every site, of each site's own training, and of a central set if there is one."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

from fedllm.messages import (
    AnyMessage,
    EvaluateInstruction,
    EvaluateReport,
    Failure,
    Instruction,
    LocalOnlyInstruction,
    LocalOnlyReport,
    Score,
)
from fedllm.update import Arrays
from fedllm.wire.transport import Envelope
from server_app.central import central_score
from server_app.checkpoint import RunState
from server_app.federation import Broadcast, Federation
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
    """Have every site evaluate the global state, and record it; None if no site could."""
    started = time.monotonic()
    poll = _Poll(federation, state, state.params, EvaluateInstruction, {"round": state.round})
    replies = poll.ask(federation.roster.available(), federation.config.rounds.deadline_s)
    scores = Scores({site: message.score for site, message in replies.items() if isinstance(message, EvaluateReport)})
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
            "central": central_score(federation.config, federation.home, state),
            "bytes_down": poll.bytes_down,
            "seconds": time.monotonic() - started,
        }
    )
    return scores


def ask_prompt(federation: Federation, state: RunState) -> None:
    """Have one site answer the prompt with the base and with the final adapter, and record it."""
    prompt = federation.config.evaluation.prompt
    if not prompt:
        return
    first = dict(list(federation.roster.available().items())[:1])
    poll = _Poll(federation, state, state.params, EvaluateInstruction, {"round": state.round, "prompt": prompt})
    for site, message in poll.ask(first, federation.config.rounds.deadline_s).items():
        if isinstance(message, EvaluateReport):
            answers = {"base": message.answer_base, "federated": message.answer}
            federation.recorder.record({"event": "answer", "prompt": prompt, "site": site, **answers})


def local_only(federation: Federation, state: RunState, initial: Arrays) -> None:
    """Have every site train alone from the first state for the federation's steps, and record its score."""
    started = time.monotonic()
    poll = _Poll(federation, state, initial, LocalOnlyInstruction, {"num_steps": federation.config.total_steps})
    patience_s = federation.config.rounds.deadline_s * federation.config.num_rounds
    replies = poll.ask(federation.roster.available(), patience_s)
    scores = Scores({site: message.score for site, message in replies.items() if isinstance(message, LocalOnlyReport)})
    if scores.sites:
        rows, seconds = scores.rows(), time.monotonic() - started
        federation.recorder.record({"event": "local_only", "sites": rows, "loss": scores.loss, "seconds": seconds})


class _Poll:
    """Sends one state and one question to sites and collects their answers.

    Args:
        federation: What the phases share.
        state: Where the federation stands.
        arrays: The state to send.
        kind: Class of the instruction.
        fields: Its own fields.
    """

    def __init__(
        self,
        federation: Federation,
        state: RunState,
        arrays: Arrays,
        kind: type[EvaluateInstruction] | type[LocalOnlyInstruction],
        fields: Mapping[str, object],
    ) -> None:
        self._federation, self._state, self._arrays = federation, state, arrays
        self._kind, self._fields = kind, fields
        self.bytes_down = 0

    def ask(self, sites: Mapping[str, Member], timeout_s: float) -> dict[str, AnyMessage]:
        """Return the answers by site; failures are logged and left out."""
        federation, round_ = self._federation, self._state.round
        federation.transport.open_round(round_)
        try:
            broadcast = federation.broadcast(self._state, self._arrays, f"{self._kind.__name__}-{round_:05d}")
            pending = federation.exchange.send(self._messages(sites, broadcast), group=f"round-{round_}")
            self.bytes_down = broadcast.num_bytes * len(sites)
            names = {member.node: name for name, member in sites.items()}
            replies = federation.exchange.replies(pending, time.monotonic() + timeout_s)
            answers = {names[reply.node]: reply.message for reply in replies}
        finally:
            federation.transport.close_round(round_)
        for site, message in answers.items():
            if isinstance(message, Failure):
                log.warning("%s could not do what was asked: %s: %s", site, message.error, message.reason)
        return answers

    def _messages(
        self, sites: Mapping[str, Member], broadcast: Broadcast
    ) -> dict[int, tuple[Instruction, Envelope | None]]:
        instruction = self._kind.model_validate(
            {
                **self._federation.instruction,
                "state_id": broadcast.state_id,
                "layout": self._state.layout.digest,
                "base": self._state.agreement.base,
                **self._fields,
            }
        )
        return {
            member.node: (
                instruction,
                self._federation.offer(self._state.round, name, broadcast.state_id, with_update=False),
            )
            for name, member in sites.items()
        }
