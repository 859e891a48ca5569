"""What the run cost and who took part: bytes, seconds, participation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fedllm.text import human_bytes, human_seconds
from server_app.events import Round
from server_app.report.charts import Labels, Segment, bar_chart
from server_app.report.figures import figure, section, swatches
from server_app.report.markup import Markup, el, join
from server_app.report.material import NONE, Material, loss_text, plural
from server_app.report.scales import byte_unit, time_unit
from server_app.results import Results, natural
from server_app.story import LEAST_TOLD

_COLOURS = ("s1", "s2", "s3", "s4", "s5", "s6", "s7", "s8")
_OTHER = "other"
_HEAD = {
    "round": None,
    "took part": "num",
    "rejected, and why": None,
    "training loss": "num",
    "update norm": "num",
    "up": "num",
    "time": "num",
}


def cost(material: Material) -> Markup:
    """Return the charts of bytes and seconds per round; nothing before the first round."""
    results = material.results
    if not results.attempts:
        return Markup()
    return section(
        "What it cost",
        "Payload bytes and seconds of every round, attempts without quorum included.",
        el("div", _bytes_chart(results), _seconds_chart(results), class_="pair"),
    )


def _bytes_chart(results: Results) -> Markup:
    traffic = {round_: _traffic(results, round_) for round_ in _numbers(results)}
    unit = byte_unit(max(max(up, down + heldout) for up, down, heldout in traffic.values()))
    bars = [
        (
            round_,
            [
                [Segment("to the server", up, "s1")],
                [Segment("to sites, for training", down, "s3"), Segment("to sites, for evaluation", heldout, "s7")],
            ],
        )
        for round_, (up, down, heldout) in traffic.items()
    ]
    words = f"{human_bytes(results.bytes_up)} from sites to the server, {human_bytes(results.bytes_down)} to the sites."
    labels = Labels("bytes", "Bytes per round", words, f"payload in {unit.name}")
    names = [("s1", "to the server"), ("s3", "to sites, for training"), ("s7", "to sites, for evaluation")]
    used = [any(values[index] for values in traffic.values()) for index in range(3)]
    key = swatches(name for name, is_used in zip(names, used, strict=True) if is_used)
    return figure("Traffic", words, bar_chart(labels, bars, unit), key)


def _traffic(results: Results, round_: int) -> tuple[int, int, int]:
    attempts = [attempt for attempt in results.attempts if attempt.round == round_]
    heldout = results.evaluations.get(round_)
    up, down = (sum(getattr(attempt, name) for attempt in attempts) for name in ("bytes_up", "bytes_down"))
    return up, down, heldout.bytes_down if heldout else 0


def _seconds_chart(results: Results) -> Markup:
    phases = {round_: _phases(results, round_) for round_ in _numbers(results)}
    colours = _colours(phases)
    unit = time_unit(max(sum(seconds.values()) for seconds in phases.values()))
    bars = [(round_, [_segments(seconds, colours)]) for round_, seconds in phases.items()]
    total = sum(sum(seconds.values()) for seconds in phases.values())
    words = f"{human_seconds(total)} over {plural(len(phases), 'round')}, by phase."
    labels = Labels("seconds", "Seconds per phase and round", words, f"time in {unit.name}")
    key = swatches((colour, name) for name, colour in colours.items())
    return figure("Time", words, bar_chart(labels, bars, unit), key)


def _phases(results: Results, round_: int) -> dict[str, float]:
    """Return seconds by phase over a round's attempts and its evaluation."""
    seconds: dict[str, float] = {}
    for attempt in results.attempts:
        for phase, value in attempt.phases.items() if attempt.round == round_ else ():
            seconds[phase] = seconds.get(phase, 0.0) + value
    if round_ in results.evaluations:
        seconds.setdefault("evaluate", results.evaluations[round_].seconds)
    return seconds


def _colours(phases: Mapping[int, Mapping[str, float]]) -> dict[str, str]:
    """Give the phases that take longest a colour each, in the order in which they run, and the others one together."""
    totals: dict[str, float] = {}
    for seconds in phases.values():
        for phase, value in seconds.items():
            totals[phase] = totals.get(phase, 0.0) + value
    largest = sorted(totals, key=lambda phase: -totals[phase])[: len(_COLOURS) - 1]
    visible = [phase for phase in totals if phase in largest and totals[phase] >= 0.001 * sum(totals.values())]
    colours = dict(zip(visible, _COLOURS, strict=False))
    return colours | ({_OTHER: _COLOURS[-1]} if len(visible) < len(totals) else {})


def _segments(seconds: Mapping[str, float], colours: Mapping[str, str]) -> list[Segment]:
    named = [Segment(phase, seconds[phase], colour) for phase, colour in colours.items() if phase in seconds]
    rest = sum(value for phase, value in seconds.items() if phase not in colours)
    return [*named, Segment(_OTHER, rest, colours[_OTHER])] if rest and _OTHER in colours else named


def _numbers(results: Results) -> list[int]:
    return sorted({attempt.round for attempt in results.attempts})


def participation(material: Material) -> Markup:
    """Return the table of rounds: who took part, who was rejected and why; nothing before anyone joined."""
    results = material.results
    if not results.attempts and not results.left_out:
        return Markup()
    head = el("tr", *(el("th", name, class_=kind, scope="col") for name, kind in _HEAD.items()))
    body = [_row(attempt) for attempt in results.attempts]
    table = el("div", el("table", el("thead", head), el("tbody", *body)), class_="scroll") if body else ""
    num_rejected = sum(len(attempt.rejected) for attempt in results.attempts)
    replies = "1 reply was" if num_rejected == 1 else f"{num_rejected or 'No'} replies were"
    intro = f"{replies} rejected in {plural(len(results.attempts), 'attempt')}." if results.attempts else ""
    return section("Who took part", intro, *_left_out(results), table, long=True)


def _row(attempt: Round) -> Markup:
    rejected = {part.site for part in attempt.rejected}
    used = sorted((site for site in attempt.participants if site not in rejected), key=natural)
    in_vain = attempt.event == "attempt"
    label = f"{attempt.round}, attempt {attempt.attempt}" if in_vain or attempt.attempt > 1 else str(attempt.round)
    notes = [el("div", "No quorum: nothing changed.", class_="change bad")] if in_vain else []
    notes += [el("div", el("b", part.site), f": {part.reason}") for part in attempt.rejected]
    if (attempt.discarded_energy or 0) >= LEAST_TOLD:
        notes.append(el("div", f"{attempt.discarded_energy:.2%} of the mean product's energy did not fit."))
    norm = NONE if in_vain or attempt.update_norm is None else f"{attempt.update_norm:.3g}"
    learned = (NONE if in_vain else loss_text(attempt.train_loss), norm)
    amounts = (*learned, human_bytes(attempt.bytes_up), human_seconds(attempt.seconds))
    return el(
        "tr",
        el("td", label, class_="round"),
        el("td", f"{len(used)} of {len(used) + len(rejected)}", class_="num", title=", ".join(used)),
        el("td", join(notes) or NONE, class_="why"),
        *(el("td", amount, class_="num") for amount in amounts),
    )


def _left_out(results: Results) -> Iterator[Markup]:
    for event in results.left_out:
        yield el("p", el("b", event.site), f" was left out: {event.reason}", class_="notice warn")
