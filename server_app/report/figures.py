"""Pieces that sections are put together from: a section, a figure with its caption, a legend."""

from __future__ import annotations

from collections.abc import Iterable

from server_app.report.markup import Markup, el


def section(title: str, intro: str, *content: str, long: bool = False) -> Markup:
    """Return a titled section; a long one may break over printed pages."""
    lead = el("p", intro, class_="muted") if intro else ""
    return el("section", el("h2", title), lead, *content, class_="long" if long else None)


def figure(title: str, caption: str, chart: Markup, key: str = "") -> Markup:
    """Return a chart under its title and a sentence."""
    words = el("figcaption", el("h3", title), el("p", caption, class_="muted small"))
    return el("figure", words, key, el("div", chart, class_="scroll wide"))


def legend(items: Iterable[tuple[str, str]], *, lines: bool = False) -> Markup:
    """Return a legend of (role, name): marks as in the table's dots, or lines as in the curves."""
    draw = _line_key if lines else _mark_key
    return el("div", *(el("span", draw(role), name) for role, name in items), class_="legend")


def swatches(items: Iterable[tuple[str, str]]) -> Markup:
    """Return a legend of (colour class, name) for bars."""
    return el("div", *(el("span", _swatch(role), name) for role, name in items), class_="legend")


def _line_key(role: str) -> Markup:
    kind = "curve federated" if role == "federated" else f"level {role}"
    return _key(el("line", x1=1, x2=21, y1=6, y2=6, class_=kind))


def _mark_key(role: str) -> Markup:
    if role == "base":
        return _key(el("circle", cx=11, cy=6, r=4, class_="ring base"))
    if role == "local":
        return _key(el("polygon", points="11,0.5 16.5,6 11,11.5 5.5,6", class_="fill local"))
    if role == "own":
        return _key(el("polygon", points="11,0.5 16.5,11 5.5,11", class_="fill own"))
    return _key(el("circle", cx=11, cy=6, r=5, class_="fill federated"))


def _swatch(role: str) -> Markup:
    return _key(el("rect", x=5, y=0, width=12, height=12, rx=2, class_=role))


def _key(mark: Markup) -> Markup:
    return el("svg", mark, viewBox="0 0 22 12", aria_hidden="true")
