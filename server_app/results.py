"""What a run has come to, computed from its events alone: the one reader behind story, report and ``fedllm runs``."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from server_app.events import Answer, AnyEvent, End, Evaluation, Groups, LeftOut, LocalOnly, Personalised, Round

ALL_SITES = "all sites"
COLUMNS = {"base": "base", "local_only": "local only", "federated": "federated", "personalised": "personalised"}
"""What the columns of :class:`Row` are called."""
EventT = TypeVar("EventT", bound=AnyEvent)


@dataclass(frozen=True)
class Row:
    """Held-out loss of one site, or of all, trained in up to four ways; None where it was not measured."""

    name: str
    base: float | None
    local_only: float | None
    federated: float | None
    personalised: float | None = None

    @property
    def winner(self) -> str:
        """Name of the column with the lowest loss; empty where fewer than two were measured or two are equal."""
        columns = {name: getattr(self, name) for name in COLUMNS}
        losses = {name: loss for name, loss in columns.items() if loss is not None and not math.isnan(loss)}
        if len(losses) < 2:
            return ""
        first, second = sorted(losses, key=lambda name: losses[name])[:2]
        return first if losses[first] < losses[second] else ""


@dataclass(frozen=True)
class Results:
    """A run's events, sorted by what they tell.

    Attributes:
        evaluations: By round, 0 for the base; the last one of a round counts.
        rounds: By round; the last one of a round counts.
        attempts: Rounds and attempts without quorum, in order.
        groups: Which sites share a global adapter, if that was found.
        left_out: Sites that could not take part, each with the last reason.
        local_only: Every site trained alone, if that was done.
        personalised: Every site's own adapter, if sites have one.
        answer: A prompt answered before and after, if that was asked.
        end: How the run ended, None while it has not (or goes on after an earlier end).
    """

    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    rounds: dict[int, Round] = field(default_factory=dict)
    attempts: list[Round] = field(default_factory=list)
    groups: Groups | None = None
    left_out: list[LeftOut] = field(default_factory=list)
    local_only: LocalOnly | None = None
    personalised: Personalised | None = None
    answer: Answer | None = None
    end: End | None = None

    @classmethod
    def of(cls, events: Iterable[AnyEvent]) -> Results:
        """Sort events."""
        events = list(events)
        evaluations = {event.round: event for event in events if isinstance(event, Evaluation)}
        attempts = [event for event in events if isinstance(event, Round)]
        rounds = {event.round: event for event in attempts if event.event == "round"}
        return cls(
            evaluations=dict(sorted(evaluations.items())),
            rounds=dict(sorted(rounds.items())),
            attempts=attempts,
            groups=_last(event for event in events if isinstance(event, Groups)),
            left_out=list({event.site: event for event in events if isinstance(event, LeftOut)}.values()),
            local_only=_last(event for event in events if isinstance(event, LocalOnly)),
            personalised=_last(event for event in events if isinstance(event, Personalised)),
            answer=_last(event for event in events if isinstance(event, Answer)),
            end=events[-1] if events and isinstance(events[-1], End) else None,
        )

    @property
    def last_round(self) -> int:
        """The last round that was done, 0 before the first."""
        return max([0, *self.rounds, *self.evaluations])

    @property
    def base(self) -> Evaluation | None:
        """The evaluation before any training."""
        return self.evaluations.get(0)

    @property
    def final(self) -> Evaluation | None:
        """The last evaluation after training."""
        trained = [evaluation for number, evaluation in self.evaluations.items() if number > 0]
        return trained[-1] if trained else None

    @property
    def best_round(self) -> int | None:
        """The round with the lowest held-out loss, as the run said at its end or as the evaluations say."""
        if self.end and self.end.best_round is not None:
            return self.end.best_round
        losses = {number: one.loss for number, one in self.evaluations.items() if number and not math.isnan(one.loss)}
        return min(losses, key=lambda number: (losses[number], number), default=None)

    @property
    def best(self) -> Evaluation | None:
        """The evaluation of the best round."""
        return self.evaluations.get(self.best_round) if self.best_round is not None else None

    @property
    def bytes_up(self) -> int:
        """Payload bytes from sites to the server, failed attempts included."""
        return sum(attempt.bytes_up for attempt in self.attempts)

    @property
    def bytes_down(self) -> int:
        """Payload bytes from the server to sites, failed attempts and evaluations included."""
        evaluations = sum(evaluation.bytes_down for evaluation in self.evaluations.values())
        return evaluations + sum(attempt.bytes_down for attempt in self.attempts)

    @property
    def seconds(self) -> float:
        """Seconds of all recorded work; pauses between a run and its resumption do not count."""
        training = sum(attempt.seconds for attempt in self.attempts)
        evaluating = sum(evaluation.seconds for evaluation in self.evaluations.values())
        afterwards = sum(event.seconds for event in (self.local_only, self.personalised) if event)
        return training + evaluating + afterwards

    @property
    def site_names(self) -> list[str]:
        """Every site that was evaluated or took part, in natural order (``site-2`` before ``site-10``)."""
        names = {site for evaluation in self.evaluations.values() for site in evaluation.sites}
        names |= {site for attempt in self.attempts for site in attempt.participants}
        return sorted(names, key=natural)

    def rows(self) -> list[Row]:
        """Return the final table: one row a site, then all sites."""
        overall = Row(
            ALL_SITES,
            self.base.loss if self.base else None,
            self.local_only.loss if self.local_only else None,
            self._federated(),
            self.personalised.loss if self.personalised else None,
        )
        return [*(self._row(site) for site in self.site_names), overall]

    def _row(self, site: str) -> Row:
        sources = (self.base, self.local_only, self.personalised)
        base, alone, own = ((source.sites.get(site) if source else None) for source in sources)
        return Row(
            site,
            base.loss if base else None,
            alone.loss if alone else None,
            self._federated(site),
            own.loss if own else None,
        )

    def _federated(self, site: str | None = None) -> float | None:
        """Return the loss of the last global adapter, at a site or over all.

        Where sites keep something, evaluations are of their own adapters, and the global one was evaluated at the end.
        """
        if site is None:
            return self.personalised.federated if self.personalised else self.final.loss if self.final else None
        if self.personalised and site in self.personalised.sites:
            return self.personalised.sites[site].federated
        measured = self.final.sites.get(site) if self.final else None
        return measured.loss if measured else None


def perplexity(loss: float) -> float:
    """Return e to the loss, infinity where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf if loss == loss else math.nan


def natural(name: str) -> tuple[list[tuple[int, str]], str]:
    """Return a sort key under which numbers inside names count as numbers."""
    parts = re.split(r"(\d+)", name.casefold())
    texts, digits = parts[::2], [part.lstrip("0") for part in parts[1::2]]
    numbers = [(len(part), part) for part in digits]
    return [
        item for pair in zip(((0, text) for text in texts), [*numbers, (0, "")], strict=True) for item in pair
    ], name


def _last(items: Iterable[EventT]) -> EventT | None:
    found = list(items)
    return found[-1] if found else None
