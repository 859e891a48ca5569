"""Times of the day at which work may begin: ``20:00-06:00``, several separated by commas, in the machine's local time.

A window that ends at or before its start goes on into the next day and belongs to the day on which it began.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, get_args

Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: tuple[Day, ...] = get_args(Day)

_WINDOW = re.compile(r"(\d\d):(\d\d)-(\d\d):(\d\d)")
_DAY_MINUTES = 24 * 60


@dataclass(frozen=True)
class Window:
    """Minutes of the day on which it begins; the end is exclusive and may lie on the next day."""

    start: int
    end: int


def parse_hours(text: str) -> tuple[Window, ...]:
    """Read windows such as ``00:00-06:00, 20:00-24:00``.

    Raises:
        ValueError: The text is not such a list, or names a time that there is not.
    """
    return tuple(_window(part.strip()) for part in text.split(","))


def is_open(windows: Collection[Window], days: Collection[Day], now: datetime) -> bool:
    """Tell whether work may begin at a local time."""
    minute = now.hour * 60 + now.minute
    today, before = DAYS[now.weekday()], DAYS[now.weekday() - 1]
    return any(
        (today in days and window.start <= minute < window.end)
        or (before in days and minute + _DAY_MINUTES < window.end)
        for window in windows
    )


def seconds_until_open(windows: Collection[Window], days: Collection[Day], now: datetime) -> float:
    """Return the seconds from a local time until work may begin, 0 if it may now."""
    if is_open(windows, days, now):
        return 0.0
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    openings = [
        midnight + timedelta(days=ahead, minutes=window.start)
        for ahead in range(8)
        for window in windows
        if DAYS[(now.weekday() + ahead) % 7] in days
    ]
    return min((opening - now).total_seconds() for opening in openings if opening > now)


def _window(part: str) -> Window:
    found = _WINDOW.fullmatch(part)
    if not found:
        raise ValueError(f"expected times such as '20:00-06:00', found {part!r}")
    numbers = [int(number) for number in found.groups()]
    start, end = numbers[0] * 60 + numbers[1], numbers[2] * 60 + numbers[3]
    if max(numbers[1], numbers[3]) > 59 or start >= _DAY_MINUTES or end > _DAY_MINUTES:
        raise ValueError(f"there is no such time of day: {part!r}")
    return Window(start, end if end > start else end + _DAY_MINUTES)
