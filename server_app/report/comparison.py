"""The final table and one question's answers: whether federated training helped, whom, and how much."""

from __future__ import annotations

import math
from collections.abc import Iterator

from server_app.report.charts import dot_strip
from server_app.report.figures import legend, section
from server_app.report.markup import Markup, el
from server_app.report.material import NONE, Material, change, loss_text
from server_app.results import ALL_SITES, COLUMNS, Row
from server_app.story import short_perplexity

ROLES = {"base": "base", "local_only": "local", "federated": "federated", "personalised": "own"}
"""Their class in the style sheet."""

_INTRO = (
    "Held-out loss (perplexity) of each site's own text that nobody trained on. Lower is better; the best of a row is "
    "marked. Local only: the site trained alone for as many steps."
)
_OWN = (
    " Personalised: the site's own adapter, made of the global one, what the site keeps to itself, and further steps on "
    "its own text where the run asks for some."
)
_GROUPS = " Sites of one group share a global adapter."


def comparison(material: Material) -> Markup:
    """Return the final table; nothing where no loss was measured."""
    rows = material.results.rows()
    shown = [column for column in COLUMNS if any(getattr(row, column) is not None for row in rows)]
    if not shown:
        return Markup()
    losses = [loss for row in rows for column in shown if (loss := getattr(row, column)) is not None]
    finite = [loss for loss in losses if math.isfinite(loss)] or [0.0]
    body = [_row(material, row, shown, (min(finite), max(finite))) for row in rows]
    table = el("table", el("thead", el("tr", *_heads(material, shown))), el("tbody", *body))
    key = legend((ROLES[column], COLUMNS[column]) for column in shown)
    intro = _INTRO + (_OWN if "personalised" in shown else "") + (_GROUPS if material.results.groups else "")
    return section("Does it help?", intro, key, el("div", table, class_="scroll"), long=True)


def _heads(material: Material, shown: list[str]) -> Iterator[Markup]:
    yield el("th", "site", scope="col")
    for name in ("examples", *(COLUMNS[column] for column in shown), *_further(material, shown)):
        yield el("th", name, class_="num", scope="col")
    yield el("th", "compared", scope="col")


def _further(material: Material, shown: list[str]) -> list[str]:
    """Return the names of columns that only some runs have."""
    local = material.results.local_only
    elsewhere = local is not None and any(site.loss_all_sites is not None for site in local.sites.values())
    names = ["group"] if material.results.groups else []
    names += ["change on base"] if {"base", "federated"} <= set(shown) else []
    return [*names, "local only, on all sites"] if elsewhere else names


def _row(material: Material, row: Row, shown: list[str], bounds: tuple[float, float]) -> Markup:
    further = {
        "group": _group(material, row),
        "change on base": change(row.base, row.federated),
        "local only, on all sites": _elsewhere(material, row),
    }
    numbers = [el("td", _examples(material, row), class_="num"), *(_loss_cell(row, column) for column in shown)]
    numbers += [el("td", further[name], class_="num") for name in _further(material, shown)]
    losses = {column: getattr(row, column) for column in shown}
    dots = [
        (COLUMNS[name], loss, ROLES[name]) for name, loss in losses.items() if loss is not None and math.isfinite(loss)
    ]
    name = el("td", row.name, class_="name")
    return el(
        "tr", name, *numbers, el("td", dot_strip(dots, *bounds)), class_="total" if row.name == ALL_SITES else None
    )


def _examples(material: Material, row: Row) -> str:
    counts = material.manifest.sites if material.manifest else {}
    if row.name == ALL_SITES and counts:
        return f"{sum(site.train_examples for site in counts.values()):,}"
    return f"{counts[row.name].train_examples:,}" if row.name in counts else NONE


def _group(material: Material, row: Row) -> str:
    found = material.results.groups
    return NONE if found is None or row.name == ALL_SITES else str(found.groups.get(row.name, 0))


def _elsewhere(material: Material, row: Row) -> str:
    local = material.results.local_only
    result = local.sites.get(row.name) if local else None
    return loss_text(result.loss_all_sites if result else None)


def _loss_cell(row: Row, column: str) -> Markup:
    loss: float | None = getattr(row, column)
    text = el("span", loss_text(loss), class_="win" if row.winner == column else None)
    if loss is None or not math.isfinite(loss):
        return el("td", text, class_="num")
    return el("td", text, el("span", f" ({short_perplexity(loss)})", class_="muted"), class_="num")


def answers(material: Material) -> Markup:
    """Return one question's answers before and after; nothing where none was asked."""
    answer = material.results.answer
    if answer is None:
        return Markup()
    cards = [
        el("div", el("div", name, class_="over"), *_lines(text), class_=f"answer {name}")
        for name, text in (("base", answer.base), ("federated", answer.federated))
    ]
    return section(
        "One question, before and after",
        f"Asked at {answer.site}. One answer shows a change of manner; the table above measures it.",
        el("blockquote", f"\u201c{answer.prompt}\u201d"),
        el("div", *cards, class_="answers"),
    )


def _lines(text: str) -> Iterator[Markup]:
    lines = [line for line in text.splitlines() if line.strip()] or ["(nothing)"]
    yield from (el("p", line) for line in lines)
