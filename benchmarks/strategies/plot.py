"""Held-out losses of all strategies as one drawing: a row for each, with the bounds as lines through all rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from server_app.report.markup import Markup, el
from server_app.report.scales import Plane, inner_ticks, tick_labels

WIDTH, ROW, LEFT, RIGHT, TOP, BOTTOM = 760, 24, 150, 20, 44, 50
LABEL = 80
LEVELS = {"base_loss": "base", "local_only": "local only", "centralised": "centralised"}

_STYLE = Markup(
    """
text { font: 12.5px system-ui, "Segoe UI", Roboto, "Noto Sans", Arial, sans-serif; fill: #5b6472; }
.strategy { fill: #14181f; }
.grid { stroke: #e2e6ec; }
.span { stroke: #0b62b8; stroke-width: 2; }
.loss { fill: #0b62b8; }
.own { fill: #7a3fa8; }
.level { stroke-width: 1.6; }
.base { stroke: #6b7482; stroke-dasharray: 1.5 4; }
.local_only { stroke: #b4530a; stroke-dasharray: 7 4; }
.centralised { stroke: #0a7a52; stroke-dasharray: 3 3; }
@media (prefers-color-scheme: dark) {
  text { fill: #9aa4b2; } .strategy { fill: #e8ebf0; } .grid { stroke: #2a3038; }
  .span { stroke: #6cb4f5; } .loss { fill: #6cb4f5; } .own { fill: #c79bf0; }
  .base { stroke: #98a2b0; } .local_only { stroke: #f0a05a; } .centralised { stroke: #5fd0a4; }
}
"""
)


def drawing(outcome: Mapping[str, Any]) -> Markup:
    """Return an SVG file: dots at the mean loss, lines from lowest to highest seed, triangles for personalised."""
    ranked = sorted(outcome["strategies"].items(), key=lambda item: item[1]["heldout_loss"])
    levels = _levels(outcome)
    ticks, low, high = inner_ticks(*_span(ranked, levels), 8)
    plane = Plane(WIDTH, TOP + ROW * len(ranked) + BOTTOM, LEFT, RIGHT, TOP, BOTTOM, low, high, 0.0, 1.0)
    bottom = plane.height - BOTTOM
    return el(
        "svg",
        el("title", "Held-out losses by strategy"),
        el("style", _STYLE),
        *(el("line", x1=plane.x(tick), x2=plane.x(tick), y1=float(TOP), y2=bottom, class_="grid") for tick in ticks),
        *(
            el("text", text, x=plane.x(tick), y=bottom + 18, text_anchor="middle")
            for tick, text in zip(ticks, tick_labels(ticks), strict=True)
        ),
        el("text", "held-out loss, nats per token", x=plane.x((low + high) / 2), y=bottom + 38, text_anchor="middle"),
        *(mark for name in levels for mark in _level(plane, name, levels, bottom)),
        *(mark for index, (name, result) in enumerate(ranked) for mark in _row(plane, index, name, result)),
        *_legend(),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH} {int(plane.height)}",
        role="img",
    )


def _levels(outcome: Mapping[str, Any]) -> dict[str, float]:
    values = {name: outcome.get(name) for name in LEVELS}
    return {
        name: value if isinstance(value, float) else value["heldout_loss"] for name, value in values.items() if value
    }


def _span(ranked: list[tuple[str, Any]], levels: Mapping[str, float]) -> tuple[float, float]:
    values = [row["heldout_loss"] for _, result in ranked for row in result["seeds"].values()]
    values += [result["heldout_loss_personalised"] for _, result in ranked] + list(levels.values())
    return min(values), max(values)


def _level(plane: Plane, name: str, levels: Mapping[str, float], bottom: float) -> Iterator[Markup]:
    x, label = plane.x(levels[name]), LEVELS[name]
    tip = el("title", f"{label}: {levels[name]:.3f}")
    kind = "base" if name == "base_loss" else name
    yield el("line", tip, x1=x, x2=x, y1=float(TOP), y2=bottom, class_=f"level {kind}")
    yield el("text", label, x=x, y=TOP - 6.0, text_anchor=_anchor(x, [plane.x(levels[o]) for o in levels if o != name]))


def _anchor(x: float, others: list[float]) -> str:
    """Return on which side of a line its label stands, so that it stays clear of the labels of lines nearby."""
    near = [other for other in others if abs(other - x) < LABEL]
    return "middle" if not near else "end" if x < min(near) else "start"


def _row(plane: Plane, index: int, name: str, result: Mapping[str, Any]) -> Iterator[Markup]:
    y, loss, own = TOP + ROW * (index + 0.5), result["heldout_loss"], result["heldout_loss_personalised"]
    losses = [row["heldout_loss"] for row in result["seeds"].values()]
    yield el("text", name, x=LEFT - 12.0, y=y + 4, text_anchor="end", class_="strategy")
    yield el("line", x1=plane.x(min(losses)), x2=plane.x(max(losses)), y1=y, y2=y, class_="span")
    x = plane.x(own)
    corners = f"{x:.2f},{y - 5:.2f} {x + 5:.2f},{y + 4:.2f} {x - 5:.2f},{y + 4:.2f}"
    yield el("polygon", el("title", f"{name}, personalised: {own:.3f}"), points=corners, class_="own")
    yield el("circle", el("title", f"{name}: {loss:.3f}"), cx=plane.x(loss), cy=y, r=4.5, class_="loss")


def _legend() -> Iterator[Markup]:
    yield el("circle", cx=18.0, cy=14.0, r=4.5, class_="loss")
    yield el("text", "after the last round (line: seeds)", x=30.0, y=18.0)
    yield el("polygon", points="248,9 253,18 243,18", class_="own")
    yield el("text", "personalised", x=260.0, y=18.0)
