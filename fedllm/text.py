"""Plain text for people: amounts in human units, columns that line up, strangers' strings made harmless."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

_HARMFUL = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def human_bytes(count: float) -> str:
    """Return bytes in decimal units with three figures: ``812 B``, ``1.25 kB``, ``14.2 MB``."""
    units = ["B", "kB", "MB", "GB", "TB", "PB"]
    size = float(count)
    while abs(size) >= 999.5 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.0f} B" if units[0] == "B" else f"{three_figures(size)} {units[0]}"


def three_figures(value: float) -> str:
    """Return a number of 0.0 to 999 with three figures at most: ``0.12``, ``1.25``, ``14.2``, ``812``."""
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{decimals}f}"


def human_seconds(seconds: float) -> str:
    """Return a duration: ``0.4 s``, ``41.2 s``, ``4 min 12 s``, ``2 h 05 min``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min"


def clean(text: str) -> str:
    """Return text on one line without control or formatting characters, so that it cannot steer a terminal."""
    harmless = text if text.isprintable() else "".join(_harmless(char) for char in text)
    return " ".join(harmless.split())


def _harmless(char: str) -> str:
    if char in "\t\n\r\v\f\u2028\u2029":
        return " "
    return "\ufffd" if unicodedata.category(char) in _HARMFUL else char


def width(text: str) -> int:
    """Return the columns that text takes on a terminal; East Asian wide characters take two, combining ones none."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return len(text) + wide - sum(unicodedata.category(char) in ("Mn", "Me") for char in text)


def shorten(text: str, columns: int) -> str:
    """Cut text to at most this many columns, the last of them ``…`` where something was cut."""
    if width(text) <= columns:
        return text
    kept = text
    while kept and width(kept) > columns - 1:
        kept = kept[:-1]
    return kept.rstrip() + "…"


def pad(text: str, columns: int, align: str = "<") -> str:
    """Fill text with spaces to this many columns; ``align`` is ``<`` or ``>``."""
    spaces = " " * max(0, columns - width(text))
    return spaces + text if align == ">" else text + spaces


def fit(parts: Iterable[str], columns: int, separator: str = ", ") -> str:
    """Join as many parts as fit into the columns and count the others: ``a, b and 3 more``."""
    parts = list(parts)
    line = separator.join(parts)
    if width(line) <= columns:
        return line
    rest = f" and {len(parts) - 1} more" if len(parts) > 1 else ""
    best = shorten(parts[0], columns - len(rest)) + rest
    for shown in range(2, len(parts)):
        line = f"{separator.join(parts[:shown])} and {len(parts) - shown} more"
        if width(line) > columns:
            break
        best = line
    return best


def table(rows: Sequence[Sequence[str]], align: str, gap: str = "  ") -> list[str]:
    """Lay rows of cells out in columns.

    Args:
        rows: Rows with as many cells each as ``align`` has characters; the first is usually the header.
        align: One of ``<`` and ``>`` a column.
        gap: What stands between columns.
    """
    columns = [max(width(cell) for cell in column) for column in zip(*rows, strict=True)]
    padded = ([pad(*cell) for cell in zip(row, columns, align, strict=True)] for row in rows)
    return [gap.join(cells).rstrip() for cells in padded]


def wrap(text: str, columns: int) -> list[str]:
    """Break text at spaces into lines of at most this many columns; a longer word is broken inside."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines[-1] else word
        if width(joined) <= columns:
            lines[-1] = joined
            continue
        pieces = _pieces(word, columns)
        lines = [*(lines if lines[-1] else []), *pieces]
    return lines if lines[-1] else []


def _pieces(word: str, columns: int) -> list[str]:
    pieces = [""]
    for char in word:
        if pieces[-1] and width(pieces[-1] + char) > columns:
            pieces.append("")
        pieces[-1] += char
    return pieces
