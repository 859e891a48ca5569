"""The top of the report: what run this is, its result in a sentence, the figures that matter."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from fedllm.text import human_bytes, human_seconds
from server_app.report.markup import Markup, el, join
from server_app.report.material import MINUS, Material, loss_text, percent, plural
from server_app.results import Results
from server_app.story import short_perplexity

_STATUS = {"finished": "good", "failed": "bad", "stopped": "warn", "unfinished": "warn"}


def top(material: Material) -> Markup:
    """Return the report's head: name, status, headline, tiles."""
    status = material.results.end.status if material.results.end else "unfinished"
    facts = [fact for fact in _facts(material) if fact]
    return join(
        [
            el(
                "header",
                el("div", "fedllm run report", class_="over"),
                el("h1", material.name),
                el("div", el("span", status, class_=f"chip {_STATUS[status]}"), *_spans(facts), class_="meta"),
            ),
            el("p", headline(material), class_="headline"),
            _notice(material.results),
            el("div", *_tiles(material.results), class_="tiles"),
        ]
    )


def headline(material: Material) -> str:
    """Return the result in one or two sentences."""
    results = material.results
    prefix = _how_far(material)
    if not results.base or not results.final:
        return prefix + "There is no held-out loss from before and after training to compare yet."
    before, after, num_sites = results.base.loss, results.final.loss, len(results.final.sites)
    verb = "lowered" if after < before else "raised" if after > before else "did not change"
    text = f"{prefix}Federated training over {plural(num_sites, 'site')} {verb} held-out loss"
    if after != before:
        text += f" from {loss_text(before)} to {loss_text(after)}"
        text += f" (perplexity {short_perplexity(before)} to {short_perplexity(after)})"
    return f"{text} in {plural(results.final.round, 'round')}.{_against_alone(results)}"


def _how_far(material: Material) -> str:
    results, planned = material.results, material.setting("num_rounds")
    reached = f"after round {results.last_round}" + (f" of {planned}" if planned else "")
    reached = reached if results.last_round else "before its first round was done"
    if results.end is None:
        return f"This run is under way, or was interrupted {reached}. "
    words = {"finished": "", "failed": f"This run failed {reached}. ", "stopped": f"This run was stopped {reached}. "}
    return words[results.end.status]


def _against_alone(results: Results) -> str:
    compared, won = _wins(results)
    if not compared:
        return ""
    if compared == 1:
        return " It does better than training alone." if won else " Training alone does better."
    if won in (0, compared):
        return f" {'Every' if won else 'No'} site does better than with training alone."
    return f" At {won} of {compared} sites it does better than training alone."


def _wins(results: Results) -> tuple[int, int]:
    rows = [row for row in results.rows()[:-1] if row.federated is not None and row.local_only is not None]
    return len(rows), sum((row.federated or 0) < (row.local_only or 0) for row in rows)


def _facts(material: Material) -> Iterator[str]:
    manifest = material.manifest
    if manifest:
        yield _date(manifest.created)
    base = material.setting("model.source").rpartition("/")[2]
    quantization = material.setting("model.quantization")
    yield base and f"{base}, {quantization}"
    yield material.setting("strategy.name")
    yield (
        material.setting("adapter.kind")
        and f"{material.setting('adapter.kind')} rank {material.setting('adapter.rank')}"
    )
    if manifest and manifest.num_parameters:
        yield f"{manifest.num_parameters:,} trained parameters"


def _date(created: str) -> str:
    try:
        return datetime.fromisoformat(created).strftime("%-d %B %Y, %H:%M %Z").strip(", ")
    except ValueError:
        return created


def _spans(facts: list[str]) -> list[Markup]:
    return [el("span", fact) for fact in facts]


def _notice(results: Results) -> Markup:
    end = results.end
    if not end or not end.reason:
        return Markup()
    return el("p", end.reason, class_="notice" if end.status == "failed" else "notice warn")


def _tiles(results: Results) -> Iterator[Markup]:
    base, final = results.base, results.final
    shown = final or base
    if shown:
        relative = (shown.loss - base.loss) / base.loss if base and final and base.loss else 0.0
        sign = MINUS if relative < 0 else "+"
        before = f"from {loss_text(base.loss)} ({sign}{abs(relative):.0%})" if base and final else "base, untrained"
        yield _tile("Held-out loss", loss_text(shown.loss), before)
        earlier = f"from {short_perplexity(base.loss)}" if base and final else "base, untrained"
        yield _tile("Perplexity", short_perplexity(shown.loss), earlier)
        yield _tile("Accuracy", percent(shown.accuracy), f"from {percent(base.accuracy)}" if base and final else "")
    compared, won = _wins(results)
    if compared:
        yield _tile("Sites ahead", f"{won} of {compared}", "of training alone")
    if results.attempts:
        yield _tile("Sent by sites", human_bytes(results.bytes_up), f"{human_bytes(results.bytes_down)} to them")
    if results.seconds:
        yield _tile("Work", human_seconds(results.seconds), plural(results.last_round, "round"))


def _tile(kind: str, value: str, note: str) -> Markup:
    parts = (el("div", kind, class_="kind"), el("div", value, class_="value"), el("div", note, class_="muted small"))
    return el("div", *parts, class_="tile")
