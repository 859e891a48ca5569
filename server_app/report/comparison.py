"""The final table, the learning curves and the answers: did federated training help, whom, and how much?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from server_app.events import Evaluation, Measured
from server_app.report.charts import Band, Curve, Labels, Level, dot_strip, line_chart, small_line_chart
from server_app.report.figures import figure, legend, section
from server_app.report.markup import Markup, el
from server_app.report.material import NONE, Material, change, loss_text, percent, plural
from server_app.results import ALL_SITES, Results, Row
from server_app.story import short_perplexity

MAX_PANELS = 24
_COLUMNS = {"base": "base", "local_only": "local only", "federated": "federated"}
_ROLES = {"base": "base", "local_only": "local", "federated": "federated"}


def comparison(material: Material) -> Markup:
    """Return the final table; nothing where no loss was measured."""
    results = material.results
    rows = results.rows()
    shown = [column for column in _COLUMNS if any(getattr(row, column) is not None for row in rows)]
    if not shown:
        return Markup()
    losses = [loss for row in rows for column in shown if _finite(loss := getattr(row, column))]
    bounds = (min(losses), max(losses)) if losses else (0.0, 1.0)
    spread = results.local_only and any(site.loss_all_sites is not None for site in results.local_only.sites.values())
    head = ["site", "examples", *(_COLUMNS[column] for column in shown), "change on base"]
    head += ["local only, on all sites"] if spread else []
    cells = [el("th", name, class_="" if name == "site" else "num", scope="col") for name in head]
    cells.append(el("th", legend((_ROLES[column], _COLUMNS[column]) for column in shown), scope="col"))
    body = [_row(material, row, shown, bounds, bool(spread)) for row in rows]
    return section(
        "Does it help?",
        "Held-out loss (perplexity) of each site's own text that nobody trained on. Lower is better; the best of a row is "
        "marked. Local only: the site trained alone for as many steps.",
        el("div", el("table", el("thead", el("tr", *cells)), el("tbody", *body)), class_="scroll"),
        long=True,
    )


def _row(material: Material, row: Row, shown: list[str], bounds: tuple[float, float], spread: bool) -> Markup:
    counts = material.manifest.sites.get(row.name) if material.manifest else None
    if row.name == ALL_SITES and material.manifest:
        examples = f"{sum(site.train_examples for site in material.manifest.sites.values()):,}"
    else:
        examples = f"{counts.train_examples:,}" if counts else NONE
    cells = [el("td", row.name, class_="name"), el("td", examples, class_="num")]
    cells += [_loss_cell(row, column) for column in shown]
    cells.append(el("td", change(row.base, row.federated), class_="num"))
    if spread:
        local = material.results.local_only
        result = local.sites.get(row.name) if local else None
        cells.append(el("td", loss_text(result.loss_all_sites if result else None), class_="num"))
    dots = [(_COLUMNS[column], loss, _ROLES[column]) for column in shown if _finite(loss := getattr(row, column))]
    cells.append(el("td", dot_strip(dots, *bounds)))
    return el("tr", *cells, class_="total" if row.name == ALL_SITES else None)


def _loss_cell(row: Row, column: str) -> Markup:
    loss = getattr(row, column)
    won = row.winner == column
    text = el("span", loss_text(loss), class_="win" if won else None)
    extra = el("span", f" ({short_perplexity(loss)})", class_="muted") if _finite(loss) else ""
    return el("td", text, extra, class_="num")


def curves(material: Material) -> Markup:
    """Return the learning curves over all sites and by site; nothing before a round was evaluated."""
    results = material.results
    if len(results.evaluations) < 2:
        return Markup()
    charts = (
        [_overall_loss(results), _overall_accuracy(results)] if _has_accuracy(results) else [_overall_loss(results)]
    )
    return section(
        "How it learned",
        "After every evaluated round, on held-out text. The shaded area spans the best to the worst site.",
        el("div", *charts, class_="pair"),
        *_panels(results),
        long=True,
    )


def _overall_loss(results: Results) -> Markup:
    levels = [Level("base", results.base.loss, "base")] if results.base and _finite(results.base.loss) else []
    if results.local_only and _finite(results.local_only.loss):
        levels.append(Level("local only", results.local_only.loss, "local"))
    first, last = _ends(results)
    best = f" Lowest in round {results.best_round}." if results.best_round is not None else ""
    words = f"Held-out loss over all sites went from {loss_text(first.loss)} in round {first.round} to {loss_text(last.loss)} in round {last.round}.{best}"
    labels = Labels("loss", "Held-out loss, all sites", words, "loss in nats per token")
    points = [(round_, one.loss) for round_, one in results.evaluations.items()]
    chart = line_chart(labels, Curve("federated", points), levels, _band(results, lambda part: part.loss))
    return figure("Loss", words, chart)


def _overall_accuracy(results: Results) -> Markup:
    points = [(round_, 100 * one.accuracy) for round_, one in results.evaluations.items()]
    levels = [Level("base", points[0][1], "base")] if results.base and _finite(points[0][1]) else []
    first, last = _ends(results)
    words = f"The most likely next token was right for {percent(first.accuracy)} of tokens in round {first.round}, {percent(last.accuracy)} in round {last.round}."
    labels = Labels("accuracy", "Held-out accuracy, all sites", words, "accuracy in % of tokens")
    band = _band(results, lambda part: 100 * part.accuracy)
    return figure("Accuracy", words, line_chart(labels, Curve("federated", points), levels, band, "{:.1f} %".format))


def _band(results: Results, measure: Callable[[Measured], float]) -> Band | None:
    points = []
    for round_, one in results.evaluations.items():
        values = [value for part in one.sites.values() if math.isfinite(value := measure(part))]
        points += [(round_, min(values), max(values))] if values else []
    return Band("best to worst site", points) if len(points) > 1 else None


def _ends(results: Results) -> tuple[Evaluation, Evaluation]:
    evaluations = list(results.evaluations.values())
    return evaluations[0], evaluations[-1]


def _has_accuracy(results: Results) -> bool:
    return any(math.isfinite(one.accuracy) for one in results.evaluations.values())


def _panels(results: Results) -> Iterator[Markup]:
    sites = [site for site in results.site_names if any(site in one.sites for one in results.evaluations.values())]
    losses = {site: _site_losses(results, site) for site in sites}
    everything = [
        value for points, levels in losses.values() for value in [*(y for _, y in points), *(v.value for v in levels)]
    ]
    everything = [value for value in everything if math.isfinite(value)]
    if not everything:
        return
    yield el("h3", "Loss by site", style="margin-top:22px")
    items = [
        ("federated", "federated"),
        *(
            (level, name)
            for level, name in (("local", "local only"), ("base", "base"))
            if any(v.role == level for _, levels in losses.values() for v in levels)
        ),
    ]
    yield legend(items, lines=True)
    shown = sites[:MAX_PANELS]
    yield el(
        "div", *(_panel(number, site, *losses[site], everything) for number, site in enumerate(shown)), class_="panels"
    )
    if len(sites) > len(shown):
        yield el("p", f"{plural(len(sites) - len(shown), 'further site')} in the table above.", class_="muted small")


def _site_losses(results: Results, site: str) -> tuple[list[tuple[int, float]], list[Level]]:
    points = [(round_, one.sites[site].loss) for round_, one in results.evaluations.items() if site in one.sites]
    row = next(row for row in results.rows() if row.name == site)
    levels = [
        Level(_COLUMNS[column], loss, _ROLES[column])
        for column in ("base", "local_only")
        if _finite(loss := getattr(row, column))
    ]
    return points, levels


def _panel(
    number: int, site: str, points: list[tuple[int, float]], levels: list[Level], everything: list[float]
) -> Markup:
    words = f"{site}: held-out loss " + ", ".join(
        f"{loss_text(loss)} in round {round_}" for round_, loss in (points[0], points[-1])
    )
    labels = Labels(f"site-{number}", f"Held-out loss at {site}", words + ".", "loss")
    chart = small_line_chart(labels, Curve("federated", points), levels, everything)
    head = el("h3", f"{site} ", el("span", loss_text(points[-1][1]), class_="muted"))
    return el("figure", el("figcaption", head), chart)


def answers(material: Material) -> Markup:
    """Return one question's answers before and after; nothing where none was asked."""
    answer = material.results.answer
    if answer is None:
        return Markup()
    cards = [
        el("div", el("div", title, class_="over"), *_lines(text), class_=f"answer {role}")
        for title, text, role in (("base", answer.base, "base"), ("federated", answer.federated, "federated"))
    ]
    return section(
        "One question, before and after",
        f"Asked at {answer.site}. One answer shows what changed in manner; the table above measures it.",
        el("blockquote", f"\u201c{answer.prompt}\u201d"),
        el("div", *cards, class_="answers"),
    )


def _lines(text: str) -> Iterator[Markup]:
    lines = text.strip().splitlines() or ["(nothing)"]
    yield from (el("p", line) for line in lines)


def _finite(loss: float | None) -> bool:
    return loss is not None and math.isfinite(loss)
