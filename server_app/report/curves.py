"""The learning curves: held-out loss and accuracy over the rounds, of all sites together and of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from server_app.events import Evaluation, Measured
from server_app.report.charts import Band, Curve, Labels, Level, Point, line_chart, small_line_chart
from server_app.report.comparison import ROLES
from server_app.report.figures import figure, legend, section
from server_app.report.markup import Markup, el
from server_app.report.material import Material, loss_text, percent, plural
from server_app.results import COLUMNS, Results, Row

MAX_PANELS = 24
"""Sites that get a chart of their own; the table above has all."""

_INTRO = "After every evaluated round, on held-out text. The shaded area spans the best to the worst site."


def curves(material: Material) -> Markup:
    """Return the learning curves; nothing before a round was evaluated."""
    results = material.results
    if len(results.evaluations) < 2:
        return Markup()
    measured = any(math.isfinite(one.accuracy) for one in results.evaluations.values())
    charts = [_loss(results), _accuracy(results)] if measured else [_loss(results)]
    return section("How it learned", _INTRO, el("div", *charts, class_="pair"), *_panels(results), long=True)


def _loss(results: Results) -> Markup:
    first, last = _ends(results)
    words = f"Held-out loss over all sites went from {loss_text(first.loss)} in round {first.round} "
    words += f"to {loss_text(last.loss)} in round {last.round}."
    words += f" Lowest in round {results.best_round}." if results.best_round is not None else ""
    labels = Labels("loss", "Held-out loss, all sites", words, "loss in nats per token")
    points = [(round_, one.loss) for round_, one in results.evaluations.items()]
    band = _band(results, lambda part: part.loss)
    return figure("Loss", words, line_chart(labels, Curve("federated", points), _levels(results.rows()[-1]), band))


def _accuracy(results: Results) -> Markup:
    first, last = _ends(results)
    words = f"The most likely next token was right for {percent(first.accuracy)} of tokens in round {first.round}, "
    words += f"for {percent(last.accuracy)} in round {last.round}."
    labels = Labels("accuracy", "Held-out accuracy, all sites", words, "accuracy in % of tokens")
    points = [(round_, 100 * one.accuracy) for round_, one in results.evaluations.items()]
    base = results.base.accuracy if results.base else math.nan
    levels = [Level("base", 100 * base, "base")] if math.isfinite(base) else []
    band = _band(results, lambda part: 100 * part.accuracy)
    return figure("Accuracy", words, line_chart(labels, Curve("federated", points), levels, band, "{:.1f} %".format))


def _ends(results: Results) -> tuple[Evaluation, Evaluation]:
    evaluations = list(results.evaluations.values())
    return evaluations[0], evaluations[-1]


def _band(results: Results, measure: Callable[[Measured], float]) -> Band | None:
    points = []
    for round_, one in results.evaluations.items():
        values = [value for part in one.sites.values() if math.isfinite(value := measure(part))]
        points += [(round_, min(values), max(values))] if values else []
    return Band("best to worst site", points) if len(points) > 1 else None


def _levels(row: Row) -> list[Level]:
    losses = {column: getattr(row, column) for column in ("base", "local_only")}
    finite = {column: loss for column, loss in losses.items() if loss is not None and math.isfinite(loss)}
    return [Level(COLUMNS[column], loss, ROLES[column]) for column, loss in finite.items()]


@dataclass(frozen=True)
class _Panel:
    """One site's curve with what it compares to."""

    site: str
    points: list[Point]
    levels: list[Level]

    @property
    def values(self) -> list[float]:
        """Every finite value that the panel shows."""
        values = [value for _, value in self.points] + [level.value for level in self.levels]
        return [value for value in values if math.isfinite(value)]


def _panels(results: Results) -> Iterator[Markup]:
    panels = [_panel(results, row) for row in results.rows()[:-1]]
    panels = [panel for panel in panels if panel.points]
    values = [value for panel in panels for value in panel.values]
    if not values:
        return
    roles = {level.role: level.name for panel in panels for level in panel.levels}
    yield el("h3", "Loss by site", class_="apart")
    yield legend([("federated", "federated"), *roles.items()], lines=True)
    drawn = [_draw(number, panel, values) for number, panel in enumerate(panels[:MAX_PANELS])]
    yield el("div", *drawn, class_="panels")
    if len(panels) > MAX_PANELS:
        further = plural(len(panels) - MAX_PANELS, "further site")
        yield el("p", f"{further} in the table above.", class_="muted small apart")


def _panel(results: Results, row: Row) -> _Panel:
    points = [
        (number, one.sites[row.name].loss) for number, one in results.evaluations.items() if row.name in one.sites
    ]
    return _Panel(row.name, points, _levels(row))


def _draw(number: int, panel: _Panel, values: list[float]) -> Markup:
    (first, before), (last, after) = panel.points[0], panel.points[-1]
    words = f"Held-out loss {loss_text(before)} in round {first}, {loss_text(after)} in round {last}."
    labels = Labels(f"site-{number}", f"Held-out loss at {panel.site}", words, "")
    chart = small_line_chart(labels, Curve(panel.site, panel.points), panel.levels, values)
    head = el("h3", f"{panel.site} ", el("span", loss_text(after), class_="muted"))
    return el("figure", el("figcaption", head), chart)
