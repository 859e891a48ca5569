"""Tells a run to the person who watches its log: at most five lines a round, and a table at the end.

Plain text without control codes, because Flower streams logs; as a rule under 100 columns with a logger's prefix. Every
line of a round starts with the round, so that ``grep 'round 7/'`` gives its whole story.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedllm.text import clean, fit, human_bytes, human_seconds, pad, shorten, table, width, wrap
from server_app.events import (
    Answer,
    AnyEvent,
    End,
    Evaluation,
    Groups,
    LeftOut,
    LocalOnly,
    Measured,
    Personalised,
    Round,
)
from server_app.results import COLUMNS as COLUMN_NAMES
from server_app.results import Results, Row, natural, perplexity

log = logging.getLogger(__name__)

COLUMNS = 88
LEAST_TOLD = 1e-6
"""Share of discarded energy from which on it is told; below it is rounding."""

_TEXT_COLUMNS = 72
_NAME_COLUMNS = 26
_MAX_ROWS = 40


@dataclass(frozen=True)
class Story:
    """Turns events into lines.

    Attributes:
        path: The run's folder, named at the end.
        num_rounds: Rounds that the run is to have, None if not known.
    """

    path: Path
    num_rounds: int | None = None

    def tell(self, event: AnyEvent, before: Results) -> None:
        """Log an event's lines as one record, at INFO, of an attempt in vain and of a site left out at WARNING.

        Args:
            event: What happened.
            before: What had happened before it.
        """
        unwelcome = isinstance(event, LeftOut) or (isinstance(event, Round) and event.event == "attempt")
        if lines := self.lines(event, before):
            extra = {"event": event.event, "about": {"round": getattr(event, "round", None)}}
            log.log(logging.WARNING if unwelcome else logging.INFO, "%s", "\n".join(lines), extra=extra)

    def lines(self, event: AnyEvent, before: Results) -> list[str]:
        """Return an event's lines; none for an answer, which is told at the end."""
        match event:
            case Evaluation():
                return self._labelled(event.round, _evaluation(event, before))
            case Round():
                return self._labelled(event.round, _round(event))
            case Groups():
                return self._labelled(event.round, iter([("groups", _groups(event))]))
            case LeftOut():
                return [shorten(f"left out {clean(event.site)}: {clean(event.reason)}", 12 * COLUMNS)]
            case LocalOnly():
                return [
                    f"local only  held-out loss {event.loss:.3f} where each of {len(event.sites)} sites trains alone"
                ]
            case Personalised():
                return [_personalised(event)]
            case End():
                return list(_ending(event, before, self.path))
            case Answer():
                return []

    def _labelled(self, round_: int, parts: Iterator[tuple[str, str]]) -> list[str]:
        total = "" if self.num_rounds is None else f"/{self.num_rounds}"
        label = f"round {pad(str(round_), len(total) - 1, '>')}{total}"
        return [f"{label}  {name:<8}  {text}" for name, text in parts]


def _round(event: Round) -> Iterator[tuple[str, str]]:
    reasons = {part.site: clean(part.reason) for part in event.rejected}
    used = [site for site in event.participants if site not in reasons]
    items = [f"{len(used)} of {len(used) + len(reasons)} sites"]
    if event.event == "attempt":
        reason = shorten(clean(event.reason), 4 * COLUMNS) or "too few"
        yield "trained", f"{items[0]} in attempt {event.attempt}: {reason.rstrip('.')}, nothing changed"
    else:
        items += [] if event.train_loss is None else [f"loss {event.train_loss:.3f}"]
        items += [] if event.update_norm is None else [f"update norm {event.update_norm:.3g}"]
        items += [f"{event.discarded_energy:.2%} discarded"] if (event.discarded_energy or 0) >= LEAST_TOLD else []
        traffic = [f"{human_bytes(event.bytes_up)} up", f"{human_bytes(event.bytes_down)} down"]
        yield "trained", ", ".join([*items, *traffic])
    notes = {site: clean(part.note) for site, part in event.sites.items() if part.note}
    for part in event.cut:
        less = f"claims {part.claimed:.1%} of the weight, counts {part.counted:.1%}"
        notes[part.site] = "; ".join(filter(None, [notes.get(part.site), less]))
    if notes:
        yield "note", fit(_by_reason(notes), _TEXT_COLUMNS, "; ")
    if reasons:
        yield "rejected", fit(_by_reason(reasons), _TEXT_COLUMNS, "; ")
    if event.event == "round":
        phases = sorted(event.phases.items(), key=lambda item: -item[1])
        shown = [f"{clean(name)} {human_seconds(seconds)}" for name, seconds in phases if seconds >= 0.05]
        yield "time", fit([f"{human_seconds(event.seconds)} in all", *shown], _TEXT_COLUMNS)


def _groups(event: Groups) -> str:
    members: dict[int, list[str]] = {}
    for site in sorted(event.groups, key=natural):
        members.setdefault(event.groups[site], []).append(clean(site))
    if len(members) == 1:
        return "none stand out, all sites stay together"
    clear = f"{len(members)} stand out (silhouette {event.silhouette:.2f}): "
    return clear + fit([fit(members[number], _NAME_COLUMNS) for number in sorted(members)], _TEXT_COLUMNS, " | ")


def _personalised(event: Personalised) -> str:
    further = f" after {event.num_steps} steps more" if event.num_steps else ""
    change = f"{event.loss - event.federated:+.3f} on the global adapter"
    return f"personalised  held-out loss {event.loss:.3f}{further} ({change}), {len(event.sites)} sites with their own"


def _by_reason(reasons: Mapping[str, str]) -> list[str]:
    """Return one clause for each reason with the sites that share it, the most frequent first."""
    groups: dict[str, list[str]] = {}
    for site, reason in sorted(reasons.items(), key=lambda item: natural(item[0])):
        groups.setdefault(reason, []).append(clean(site))
    by_size = sorted(groups.items(), key=lambda item: -len(item[1]))
    return [f"{fit(sites, _NAME_COLUMNS)} ({reason})" for reason, sites in by_size]


def _evaluation(event: Evaluation, before: Results) -> Iterator[tuple[str, str]]:
    earlier = {number: one for number, one in before.evaluations.items() if number < event.round}
    base, previous = earlier.get(0), earlier[max(earlier)] if earlier else None
    changes = [f"{event.loss - base.loss:+.3f} on the base"] if base else []
    if previous and previous is not base:
        changes.append(f"{event.loss - previous.loss:+.3f} on round {previous.round}")
    items = [f"loss {event.loss:.3f}" + (f" ({', '.join(changes)})" if changes else "")]
    items += [f"accuracy {100 * event.accuracy:.1f} %"] if event.accuracy == event.accuracy else []
    items += [f"central loss {event.central.loss:.3f}"] if event.central else []
    items += [] if event.attack_success is None else [f"backdoor opens {event.attack_success:.0%}"]
    yield "held-out", ", ".join(items)
    trained = before.rounds.get(event.round)
    num_lines = 1 if trained and trained.rejected else 2
    for number, line in enumerate(_by_site(event.sites, previous.sites if previous else {}, num_lines)):
        yield ("" if number else "by site"), line


def _by_site(sites: Mapping[str, Measured], previous: Mapping[str, Measured], num_lines: int) -> list[str]:
    """Return each site's loss, with its change where there is room, or the worst sites where not all have room."""
    names = sorted(sites, key=natural)
    short = {site: f"{shorten(clean(site), _NAME_COLUMNS)} {sites[site].loss:.3f}" for site in names}
    changes = {site: f" ({sites[site].loss - previous[site].loss:+.3f})" for site in names if site in previous}
    for parts in ([short[site] + changes.get(site, "") for site in names], list(short.values())):
        lines = _flow(parts)
        if len(lines) <= num_lines:
            return lines
    worst = sorted(names, key=lambda site: -sites[site].loss)
    return [fit([f"worst {short[worst[0]]}", *(short[site] for site in worst[1:])], _TEXT_COLUMNS)]


def _flow(parts: Iterable[str]) -> list[str]:
    lines: list[str] = []
    for part in parts:
        joined = f"{lines[-1]}, {part}" if lines else part
        lines[-1:] = [joined] if width(joined) <= _TEXT_COLUMNS else [*lines[-1:], part]
    return lines


def _ending(event: End, before: Results, path: Path) -> Iterator[str]:
    yield "-" * COLUMNS
    yield from _headline(event, before)
    if any(row.base is not None or row.federated is not None for row in before.rows()):
        yield ""
        yield from final_table(before)
    if before.answer:
        yield ""
        yield from _answer(before.answer)
    yield ""
    yield f"Everything about the run: {path}"
    yield f"Report for a browser:     {path / 'report.html'}"
    yield "-" * COLUMNS


def _headline(event: End, before: Results) -> Iterator[str]:
    done = f"{before.last_round} round" + ("" if before.last_round == 1 else "s")
    volume = f"{human_bytes(before.bytes_up)} up, {human_bytes(before.bytes_down)} down"
    yield f"{event.status.capitalize()} after {done} and {human_seconds(before.seconds)} of work; {volume}"
    if event.reason:
        yield from wrap(clean(event.reason), COLUMNS)
    best = before.evaluations.get(event.best_round) if event.best_round is not None else None
    if best:
        yield f"Best round: {best.round} (held-out loss {best.loss:.3f})"


def final_table(results: Results) -> list[str]:
    """Return the table of sites by base, local-only, federated and personalised training, in at most 88 columns."""
    rows = results.rows()
    shown = [name for name in COLUMN_NAMES if any(getattr(row, name) is not None for row in rows)]
    header = ["held-out loss (perplexity)", *(COLUMN_NAMES[name] + "  " for name in shown)]
    told = [*rows[:_MAX_ROWS], rows[-1]] if len(rows) > _MAX_ROWS + 1 else rows
    body = [[shorten(clean(row.name), _NAME_COLUMNS), *(_cell(row, name) for name in shown)] for row in told]
    lines = table([header, *body], "<" + ">" * len(shown))
    rule = "-" * max(map(width, lines))
    rest = [f"({len(rows) - len(told)} more sites: see the report)"] if len(told) < len(rows) else []
    return [lines[0], rule, *lines[1:-1], *rest, rule, lines[-1], f"{'* lowest of its row':>{len(rule)}}"]


def _cell(row: Row, column: str) -> str:
    loss = getattr(row, column)
    if loss is None:
        return "-  "
    return f"{loss:.3f} ({short_perplexity(loss)})" + (" *" if row.winner == column else "  ")


def short_perplexity(loss: float) -> str:
    """Return the perplexity of a loss with three or four figures, or in powers of ten where it is huge."""
    value = perplexity(loss)
    return f"{value:.1f}" if value < 1e4 else f"{value:.1e}"


def _answer(answer: Answer) -> Iterator[str]:
    parts = {"asked": answer.prompt, "base": answer.base, "federated": answer.federated}
    yield f"One question, asked at {clean(answer.site)}"
    for name, text in parts.items():
        lines = wrap(clean(text) or "(nothing)", COLUMNS - 13)
        yield from (f"  {name if number == 0 else '':<9}  {line}" for number, line in enumerate(lines))
