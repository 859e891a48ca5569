"""What a report is made of, and the words and figures that several of its sections share."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedllm.manifest import Manifest
from server_app.report.markup import Markup, el
from server_app.results import Results

MINUS, NONE = "\u2212", "\u2013"


@dataclass(frozen=True)
class Material:
    """A run as its files tell it.

    Attributes:
        name: The run's name.
        manifest: What the run is, None where the file is missing or unreadable.
        results: What it came to.
    """

    name: str
    manifest: Manifest | None
    results: Results

    def setting(self, key: str) -> str:
        """Return a setting of the run's config as text, empty where it is not known."""
        value = self.manifest.config.get(key, "") if self.manifest else ""
        return str(value)


def loss_text(loss: float | None) -> str:
    """Write a loss with three decimals."""
    if loss is None:
        return NONE
    return f"{loss:.3f}" if math.isfinite(loss) else "not finite"


def percent(share: float | None) -> str:
    """Write a share of one as per cent."""
    return NONE if share is None or not math.isfinite(share) else f"{100 * share:.1f}\u202f%"


def signed(value: float, text: str) -> str:
    """Put a real plus or minus sign before the text of an amount; none where it reads as zero."""
    if not any(digit in "123456789" for digit in text):
        return text
    return ("+" if value > 0 else MINUS) + text


def change(before: float | None, after: float | None) -> Markup:
    """Return a change of loss, coloured and signed: falling is good."""
    if before is None or after is None or not math.isfinite(after - before):
        return el("span", NONE)
    difference = after - before
    verdict = "" if abs(difference) < 0.0005 else "good" if difference < 0 else "bad"
    return el("span", signed(difference, f"{abs(difference):.3f}"), class_=f"change {verdict}".strip())


def plural(count: int, noun: str) -> str:
    """Return a count with its noun: ``1 round``, ``7 rounds``."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
