"""How many rounds the site has trained, by run and by day: what `max_rounds_per_run` and `max_rounds_per_day` bound.

The count is kept in ``rounds.json`` of the site's state directory, for all runs together, replaced whole and under a lock.
A round is counted before it is trained, so a crash can count one too many but never one too few. A request that was
counted before, which the site answers from its disk, counts once.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from client_app.policy.rules import Refusal
from client_app.policy.settings import PolicySection
from fedllm.errors import PolicyError, explain
from fedllm.files import atomic_write, locked

FILE = "rounds.json"

_KEPT_DAYS = 31
_RUN_CHARS = 200


class RoundBook(BaseModel):
    """What was trained.

    Attributes:
        days: Rounds by local date, the last 31 days.
        runs: Requests by run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    days: dict[str, int] = Field(default_factory=dict)
    runs: dict[str, tuple[str, ...]] = Field(default_factory=dict)

    def knows(self, run: str, request: str) -> bool:
        """Tell whether a request was counted."""
        return request in self.runs.get(run[:_RUN_CHARS], ())

    def with_round(self, run: str, request: str, now: datetime) -> RoundBook:
        """Return the book with one round more."""
        run, today = run[:_RUN_CHARS], now.date().isoformat()
        oldest = (now.date() - timedelta(days=_KEPT_DAYS)).isoformat()
        days = {day: count for day, count in self.days.items() if day > oldest}
        days[today] = days.get(today, 0) + 1
        return RoundBook(days=days, runs={**self.runs, run: (*self.runs.get(run, ()), request)})

    def refusals(self, policy: PolicySection, run: str, now: datetime) -> Iterator[Refusal]:
        """Yield what speaks against one round more."""
        done, bound = len(self.runs.get(run[:_RUN_CHARS], ())), policy.max_rounds_per_run
        if bound and done >= bound:
            problem = "the site has trained as many rounds for this run as it may"
            yield Refusal(problem, "policy.max_rounds_per_run", f"at most {bound}", f"{done} done")
        done, bound = self.days.get(now.date().isoformat(), 0), policy.max_rounds_per_day
        if bound and done >= bound:
            tomorrow = datetime.combine(now.date() + timedelta(days=1), datetime.min.time())
            wait = (tomorrow - now.replace(tzinfo=None)).total_seconds()
            problem = "the site has trained as many rounds today as it may"
            yield Refusal(problem, "policy.max_rounds_per_day", f"at most {bound}", f"{done} done", wait)


def count_round(folder: Path, policy: PolicySection, run: str, request: str, now: datetime) -> list[Refusal]:
    """Count one round, unless something speaks against it, which is returned.

    Args:
        folder: The site's state directory.
        policy: The bounds.
        run: The run's name.
        request: Names what is asked, the same when it is asked again.
        now: Local time.

    Raises:
        PolicyError: The count cannot be read or written; without it nothing is trained.
    """
    path = folder / FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock")):
            book = _read(path)
            if book.knows(run, request):
                return []
            found = list(book.refusals(policy, run, now))
            if not found:
                atomic_write(path, book.with_round(run, request, now).model_dump_json())
            return found
    except OSError as error:
        fix = "The site's admin must make room or fix permissions."
        raise PolicyError(explain("rounds cannot be counted", found=error.strerror, where=FILE, fix=fix)) from error


def _read(path: Path) -> RoundBook:
    try:
        return RoundBook.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return RoundBook()
    except ValidationError as error:
        fix = "The site's admin can move the file away, which begins the count anew."
        raise PolicyError(explain("the count of rounds is damaged", where=FILE, fix=fix)) from error
