"""A board of figures: counters, gauges and summaries that are declared once and kept by name and labels.

It knows nothing of how figures are shown (:mod:`fedllm.observability.endpoint`). So the ClientApp, which lives for one
piece of work, can keep its board in a file, and a process that lives longer shows it.

Names follow Prometheus: base units, ``_total`` behind a counter. Every label takes values from a small set that is known
beforehand; a name from outside counts among :data:`OTHERS` once there are too many (:class:`Bounded`).

Evolution of the file: families and labels are only added; what a release does not know or knows otherwise it leaves out.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

OTHERS = "(others)"
"""Stands for all names beyond a bound; no site can have it for a name."""


@dataclass(frozen=True)
class Family:
    """Figures of one name.

    Attributes:
        name: As Prometheus knows it; a summary's figures have ``_sum`` and ``_count`` behind it.
        kind: ``counter`` (only grows), ``gauge`` (a state), ``summary`` (the sum of observations and their number).
        help: What it counts, in a sentence.
        labels: Names of its labels.
    """

    name: str
    kind: Literal["counter", "gauge", "summary"]
    help: str
    labels: tuple[str, ...] = ()

    @property
    def series(self) -> tuple[str, ...]:
        """The names that can be asked for."""
        return (f"{self.name}_sum", f"{self.name}_count") if self.kind == "summary" else (self.name,)


class Figure(BaseModel):
    """One figure of a board: its family, the values of the family's labels in order, and its value.

    A summary's value is the sum of what was observed, ``count`` says of how much.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="strings")

    family: str
    labels: tuple[str, ...] = ()
    value: float
    count: int = 0


class Board:
    """Figures by name and labels; may be written by one thread while others read.

    Args:
        families: What can be on it.
        figures: What is on it to begin with; figures of other families, or with other labels, are left out.
    """

    def __init__(self, families: Iterable[Family], figures: Iterable[Figure] = ()) -> None:
        self.families = {family.name: family for family in families}
        self._lock = threading.Lock()
        known = (figure for figure in figures if self._is_known(figure))
        self._figures = {(figure.family, figure.labels): figure for figure in known}

    def add(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Let a counter grow."""
        self._change(name, "counter", labels, amount)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add one observation to a summary."""
        self._change(name, "summary", labels, value)

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        self._change(name, "gauge", labels, value)

    def figures(self, name: str | None = None) -> Iterator[Figure]:
        """Yield the figures of one family, or of all in the families' order."""
        with self._lock:
            found = list(self._figures.values())
        for wanted in [name] if name else self.families:
            yield from (figure for figure in found if figure.family == wanted)

    def _change(self, name: str, kind: str, labels: Mapping[str, str], value: float) -> None:
        family = self.families[name]
        assert family.kind == kind, f"{name} is a {family.kind}"
        assert set(labels) == set(family.labels), f"{name} has the labels {family.labels}"
        key = name, tuple(labels[label] for label in family.labels)
        with self._lock:
            before = self._figures.get(key)
            if before is not None and kind != "gauge":
                value += before.value
            count = (before.count if before else 0) + 1 if kind == "summary" else 0
            self._figures[key] = Figure(family=name, labels=key[1], value=value, count=count)

    def _is_known(self, figure: Figure) -> bool:
        family = self.families.get(figure.family)
        return family is not None and len(family.labels) == len(figure.labels)


class Bounded:
    """Lets a bounded number of names through and puts :data:`OTHERS` in the place of any further one.

    Args:
        most: How many.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._names: set[str] = set()

    def __call__(self, name: str) -> str:
        """Return the name, or what stands for it."""
        if len(self._names) < self._most:
            self._names.add(name)
        return name if name in self._names else OTHERS
