"""HTML and SVG as values: whatever is not :class:`Markup` already is escaped, so nothing can be forgotten."""

from __future__ import annotations

import html
from collections.abc import Iterable

from fedllm.text import clean

_VOID = {"meta", "br", "col"}

Attribute = str | int | float | None


class Markup(str):
    """Text that is HTML and goes into a page as it stands."""

    __slots__ = ()


def el(tag: str, *children: str, **attributes: Attribute) -> Markup:
    """Return an element.

    Args:
        tag: Its name.
        children: Markup, or text that is escaped and freed of control characters.
        attributes: By name; ``class_`` is ``class``, other underscores are hyphens, None leaves the attribute out.
    """
    written = "".join(_attribute(name, value) for name, value in attributes.items() if value is not None)
    if tag in _VOID:
        return Markup(f"<{tag}{written}>")
    return Markup(f"<{tag}{written}>{join(children)}</{tag}>")


def join(children: Iterable[str]) -> Markup:
    """Return children beside each other, those that are not markup escaped."""
    return Markup("".join(child if isinstance(child, Markup) else _escaped(child) for child in children))


def number(value: float) -> str:
    """Return a coordinate with two decimals at most, always the same text for the same value."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def _attribute(name: str, value: str | int | float) -> str:
    text = number(value) if isinstance(value, float) else str(value)
    return f' {name.rstrip("_").replace("_", "-")}="{_escaped(text)}"'


def _escaped(text: str) -> str:
    """Escape text, keeping the spaces at its ends, which separate it from its neighbours."""
    lead = " " if text[:1].isspace() else ""
    tail = " " if text[-1:].isspace() and text.strip() else ""
    return html.escape(lead + clean(text) + tail)
