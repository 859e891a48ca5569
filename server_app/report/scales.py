"""From numbers to places on paper: round ticks, and a plane that maps values to pixels."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from fedllm.text import three_figures


def round_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Return about ``wanted`` evenly spaced round numbers that enclose ``low`` to ``high``."""
    if not high > low:
        low, high = low - (abs(low) / 2 or 0.5), high + (abs(high) / 2 or 0.5)
    step = _round_step((high - low) / max(1, wanted - 1))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def inner_ticks(low: float, high: float, wanted: int = 5) -> tuple[list[float], float, float]:
    """Return about ``wanted`` round numbers inside a range a little larger than ``low`` to ``high``, and that range."""
    if not high > low:
        low, high = low - (abs(low) / 10 or 0.5), high + (abs(high) / 10 or 0.5)
    margin = 0.06 * (high - low)
    low, high = low - margin, high + margin
    return [tick for tick in round_ticks(low, high, wanted) if low <= tick <= high], low, high


def whole_ticks(low: int, high: int, wanted: int = 10) -> list[int]:
    """Return at most about ``wanted`` evenly spaced whole numbers of ``low`` to ``high``, starting at multiples."""
    step = max(1, math.ceil(_round_step(max(1, high - low) / wanted)))
    return [value for value in range(low, high + 1) if value % step == 0] or [low]


def tick_labels(ticks: list[float]) -> list[str]:
    """Write ticks with as many decimals as tell them apart."""
    step = abs(ticks[1] - ticks[0]) if len(ticks) > 1 else 1.0
    decimals = next((count for count in range(7) if math.isclose(round(step, count), step, rel_tol=1e-6)), 6)
    return [f"{tick:.{decimals}f}" for tick in ticks]


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= step * (1 - 1e-9))


@dataclass(frozen=True)
class Plane:
    """The drawing area of a chart inside its margins, in pixels, and the values that it spans."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        """Return the horizontal place of a value."""
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return self.left + share * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        """Return the vertical place of a value; larger values are higher up."""
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return self.height - self.bottom - share * (self.height - self.top - self.bottom)


def spread(places: Iterable[float], gap: float, low: float, high: float) -> list[float]:
    """Move places on a line apart to at least ``gap``, keeping their order, within bounds as far as they have room."""
    places = list(places)
    order = sorted(range(len(places)), key=lambda index: places[index])
    moved = list(places)
    floor = low
    for index in order:
        moved[index] = floor = max(floor, moved[index])
        floor += gap
    ceiling = high
    for index in reversed(order):
        moved[index] = ceiling = min(ceiling, moved[index])
        ceiling -= gap
    return moved


@dataclass(frozen=True)
class Unit:
    """A unit for an axis: its name, and how many base units it holds."""

    name: str
    size: float

    def write(self, value: float) -> str:
        """Return an amount in the unit with its name."""
        return f"{three_figures(value / self.size)} {self.name}"


def byte_unit(largest: float) -> Unit:
    """Return the decimal unit that suits amounts of bytes up to the largest."""
    units = [Unit("TB", 1e12), Unit("GB", 1e9), Unit("MB", 1e6), Unit("kB", 1e3)]
    return next((unit for unit in units if largest >= unit.size), Unit("B", 1.0))


def time_unit(largest: float) -> Unit:
    """Return the unit that suits durations of up to the largest number of seconds."""
    units = [Unit("h", 3600.0), Unit("min", 60.0)]
    return next((unit for unit in units if largest >= 3 * unit.size), Unit("s", 1.0))
