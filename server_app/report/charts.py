"""Charts as inline SVG, drawn by hand so that they follow the page's colours in light and dark and need nothing else.

Colours come from the page's style by class (``federated``, ``local``, ``base``, ``series-1`` ...). Every mark that holds a
value has a ``<title>``, which browsers show on hovering and read aloud; every chart has a title and a description.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from server_app.report.markup import Markup, el, join, number
from server_app.report.scales import Plane, Unit, inner_ticks, round_ticks, spread, tick_labels, whole_ticks

Point = tuple[int, float]
Write = Callable[[float], str]

_LABEL_GAP = 15.0


@dataclass(frozen=True)
class Curve:
    """A line through the rounds. Points that are not finite leave a gap."""

    name: str
    points: Sequence[Point]
    role: str = "federated"


@dataclass(frozen=True)
class Level:
    """A horizontal line to compare with."""

    name: str
    value: float
    role: str


@dataclass(frozen=True)
class Band:
    """An area from the lowest to the highest site: (round, low, high)."""

    name: str
    points: Sequence[tuple[int, float, float]]


@dataclass(frozen=True)
class Segment:
    """A part of a bar, stacked on the parts before it."""

    name: str
    value: float
    role: str


@dataclass(frozen=True)
class Labels:
    """A chart's words.

    Attributes:
        slug: Identifies the chart on the page.
        title: What it shows.
        description: What a person who cannot see it should know.
        y_axis: Quantity and unit of the vertical axis.
    """

    slug: str
    title: str
    description: str
    y_axis: str


def line_chart(
    labels: Labels, curve: Curve, levels: Sequence[Level] = (), band: Band | None = None, write: Write = "{:.3f}".format
) -> Markup:
    """Draw one curve over the rounds with levels and a band behind it, each named at its right end."""
    plane, ticks = _line_plane(curve, levels, band, width=560, height=300, margins=(58, 112, 14, 46))
    ends = [(level.value, level.name, level.role) for level in levels]
    last = _finite(curve.points)[-1:]
    ends += [(value, curve.name, curve.role) for _, value in last]
    return _svg(
        plane,
        labels,
        _y_axis(plane, ticks, labels.y_axis, write=None),
        _x_axis(plane),
        _band(plane, band) if band else "",
        *(_level(plane, level, write) for level in levels),
        _curve(plane, curve, write),
        _end_labels(plane, ends),
    )


def small_line_chart(
    labels: Labels, curve: Curve, levels: Sequence[Level], scale_of: Sequence[float], write: Write = "{:.3f}".format
) -> Markup:
    """Draw one curve without names, for a grid of charts that share one vertical scale, that of ``scale_of``."""
    whole = Band("", [(round_, min(scale_of), max(scale_of)) for round_, _ in curve.points])
    plane, ticks = _line_plane(curve, levels, whole, width=230, height=132, margins=(34, 10, 8, 22), num_ticks=4)
    return _svg(
        plane,
        labels,
        _y_axis(plane, ticks, "", write=None),
        _x_axis(plane, wanted=4, name=""),
        *(_level(plane, level, write) for level in levels),
        _curve(plane, curve, write, radius=2.2),
    )


def bar_chart(labels: Labels, bars: Sequence[tuple[int, Sequence[Sequence[Segment]]]], unit: Unit) -> Markup:
    """Draw for each round some bars beside each other, each a stack of segments from zero upwards."""
    highest = max(sum(part.value for part in stack) for _, stacks in bars for stack in stacks)
    ticks = round_ticks(0.0, (highest / unit.size) or 1.0)
    rounds = [round_ for round_, _ in bars]
    plane = Plane(560, 300, 58, 14, 14, 46, min(rounds) - 0.5, max(rounds) + 0.5, 0.0, ticks[-1] * unit.size)
    return _svg(
        plane,
        labels,
        _y_axis(
            plane, [tick * unit.size for tick in ticks], labels.y_axis, write=lambda value: number(value / unit.size)
        ),
        _x_axis(plane),
        *(mark for round_, stacks in bars for mark in _bars(plane, round_, stacks, unit)),
    )


def dot_strip(
    dots: Sequence[tuple[str, float, str]], low: float, high: float, write: Write = "{:.3f}".format
) -> Markup:
    """Draw values of one row as dots on a line, for a column of a table; all rows share ``low`` to ``high``."""
    plane = Plane(170, 22, 8, 8, 0, 0, low, high if high > low else low + 1, 0, 1)
    text = ", ".join(f"{name} {write(value)}" for name, value, _ in dots)
    marks = [el("line", x1=8.0, x2=162.0, y1=11.0, y2=11.0, class_="rule")]
    for name, value, role in dots:
        tip = el("title", f"{name}: {write(value)}")
        marks.append(_marker(plane.x(value), 11.0, role, tip))
    return el("svg", *marks, viewBox="0 0 170 22", class_="strip", role="img", aria_label=text)


def _marker(x: float, y: float, role: str, tip: Markup) -> Markup:
    """Draw a shape that differs by role, so that colour alone carries nothing."""
    if role == "base":
        return el("circle", tip, cx=x, cy=y, r=4.5, class_="ring base")
    if role == "local":
        corners = [(x, y - 6), (x + 6, y), (x, y + 6), (x - 6, y)]
        return el("polygon", tip, points=_path(corners), class_="fill local")
    if role == "own":
        return el("polygon", tip, points=_path([(x, y - 6), (x + 6, y + 5), (x - 6, y + 5)]), class_="fill own")
    return el("circle", tip, cx=x, cy=y, r=5.5, class_="fill federated")


def _line_plane(
    curve: Curve,
    levels: Sequence[Level],
    band: Band | None,
    width: float,
    height: float,
    margins: tuple[float, float, float, float],
    num_ticks: int = 6,
) -> tuple[Plane, list[float]]:
    values = [value for _, value in curve.points] + [level.value for level in levels]
    values += [edge for _, *edges in (band.points if band else ()) for edge in edges]
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    ticks, low, high = inner_ticks(min(finite), max(finite), num_ticks)
    rounds = [round_ for round_, _ in curve.points]
    x_low, x_high = min(rounds, default=0), max(rounds, default=1)
    return Plane(width, height, *margins, x_low, max(x_high, x_low + 1), low, high), ticks


def _svg(plane: Plane, labels: Labels, *marks: str) -> Markup:
    title, description = f"{labels.slug}-title", f"{labels.slug}-description"
    return el(
        "svg",
        el("title", labels.title, id=title),
        el("desc", labels.description, id=description),
        *marks,
        viewBox=f"0 0 {number(plane.width)} {number(plane.height)}",
        role="img",
        aria_labelledby=f"{title} {description}",
        class_="chart",
    )


def _y_axis(plane: Plane, ticks: list[float], name: str, write: Write | None) -> Markup:
    texts = tick_labels(ticks) if write is None else [write(tick) for tick in ticks]
    right = plane.width - plane.right
    lines = [el("line", x1=plane.left, x2=right, y1=plane.y(tick), y2=plane.y(tick)) for tick in ticks]
    words = [
        el("text", text, x=plane.left - 7, y=plane.y(tick) + 4, text_anchor="end")
        for text, tick in zip(texts, ticks, strict=True)
    ]
    middle = (plane.top + plane.height - plane.bottom) / 2
    turned = f"rotate(-90 13 {number(middle)})"
    words += [el("text", name, x=13.0, y=middle, transform=turned, text_anchor="middle", class_="name")] if name else []
    return join([el("g", *lines, class_="grid"), el("g", *words, class_="axis")])


def _x_axis(plane: Plane, wanted: int = 10, name: str = "round") -> Markup:
    bottom = plane.height - plane.bottom
    ticks = whole_ticks(math.ceil(plane.x_low), math.floor(plane.x_high), wanted)
    words = [el("text", str(tick), x=plane.x(tick), y=bottom + 17, text_anchor="middle") for tick in ticks]
    middle = (plane.left + plane.width - plane.right) / 2
    words += [el("text", name, x=middle, y=bottom + 37, text_anchor="middle", class_="name")] if name else []
    return el("g", *words, class_="axis")


def _curve(plane: Plane, curve: Curve, write: Write, radius: float = 3.6) -> Markup:
    pieces = [
        el("polyline", points=_path((plane.x(x), plane.y(y)) for x, y in piece), class_=f"curve {curve.role}")
        for piece in _pieces(curve.points)
        if len(piece) > 1
    ]
    if len(curve.points) > 60:  # dots would merge into a thicker line
        radius = min(radius, 1.6)
    dots = [
        el(
            "circle",
            el("title", f"{curve.name}, round {x}: {write(y)}"),
            cx=plane.x(x),
            cy=plane.y(y),
            r=radius,
            class_=f"dot {curve.role}",
        )
        for x, y in _finite(curve.points)
    ]
    return join([*pieces, *dots])


def _pieces(points: Sequence[Point]) -> Iterator[list[Point]]:
    piece: list[Point] = []
    for point in points:
        if math.isfinite(point[1]):
            piece.append(point)
        else:
            yield piece
            piece = []
    yield piece


def _finite(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if math.isfinite(point[1])]


def _level(plane: Plane, level: Level, write: Write) -> Markup:
    tip = el("title", f"{level.name}: {write(level.value)}")
    place, right = plane.y(level.value), plane.width - plane.right
    return el("line", tip, x1=plane.left, x2=right, y1=place, y2=place, class_=f"level {level.role}")


def _band(plane: Plane, band: Band) -> Markup:
    points = [point for point in band.points if math.isfinite(point[1]) and math.isfinite(point[2])]
    upper = [(plane.x(x), plane.y(high)) for x, _, high in points]
    lower = [(plane.x(x), plane.y(low)) for x, low, _ in reversed(points)]
    return el("polygon", el("title", band.name), points=_path([*upper, *lower]), class_="band")


def _end_labels(plane: Plane, ends: Sequence[tuple[float, str, str]]) -> Markup:
    wanted = [plane.y(value) for value, _, _ in ends]
    places = spread(wanted, _LABEL_GAP, plane.top + 4, plane.height - plane.bottom)
    left = plane.width - plane.right + 10
    return el(
        "g",
        *(
            el("text", name, x=left, y=place + 4, class_=f"label {role}")
            for (_, name, role), place in zip(ends, places, strict=True)
        ),
    )


def _bars(plane: Plane, round_: int, stacks: Sequence[Sequence[Segment]], unit: Unit) -> Iterator[Markup]:
    slot = (plane.x(1.0) - plane.x(0.0)) * 0.72
    slot, each = min(slot, 64.0), min(slot, 64.0) / max(1, len(stacks))
    for position, stack in enumerate(stacks):
        left, base = plane.x(round_) - slot / 2 + position * each, 0.0
        for part in stack:
            tip = el("title", f"round {round_}, {part.name}: {unit.write(part.value)}")
            top, bottom = plane.y(base + part.value), plane.y(base)
            base += part.value
            size = {"width": max(each - (1.5 if each > 6 else 0.0), 0.5), "height": max(bottom - top, 0.0)}
            yield el("rect", tip, x=left, y=top, class_=f"fill {part.role}", **size)


def _path(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{number(x)},{number(y)}" for x, y in points)
