"""What a check finds: one line with a status and, where something is wrong, what to do."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

Fact = str | int | float | bool


class Status(enum.StrEnum):
    """How bad it is."""

    OK = "ok"
    """As it should be."""
    WARNING = "warning"
    """The site can join; somebody should look at it."""
    FAILURE = "failure"
    """The site cannot join, or would not be safe."""


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's.

    Attributes:
        check: What was looked at, a word or two.
        status: How bad it is.
        message: What was found. Never content of the site's data.
        fix: What to do, empty where nothing needs to be done.
        facts: The same for programs: numbers without units, full digests.
    """

    check: str
    status: Status
    message: str
    fix: str = ""
    facts: Mapping[str, Fact] = field(default_factory=dict)


def ok(check: str, message: str, **facts: Fact) -> Finding:
    """Say that something is as it should be."""
    return Finding(check, Status.OK, message, facts=facts)


def warning(check: str, message: str, fix: str, **facts: Fact) -> Finding:
    """Say that somebody should look at something."""
    return Finding(check, Status.WARNING, message, fix, facts)


def failure(check: str, message: str, fix: str, **facts: Fact) -> Finding:
    """Say what keeps the site from joining."""
    return Finding(check, Status.FAILURE, message, fix, facts)


def worst(findings: Iterable[Finding]) -> Status:
    """Return the worst status among findings."""
    order = list(Status)
    return max((finding.status for finding in findings), key=order.index, default=Status.OK)
