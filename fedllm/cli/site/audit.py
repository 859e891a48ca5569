"""``fedllm site audit``: what came to the site and what left it, and whether the log of it is as it was written."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedllm.cli.command import Command, add_json, print_json
from fedllm.cli.site.kit import add_kit
from fedllm.text import clean, human_bytes, shorten

if TYPE_CHECKING:
    from client_app.audit.log import AuditLog, Line

FITS, DOES_NOT_FIT = 0, 1
_REASON_COLUMNS = 300
_SHOWN_SETTINGS = ("strategy.name", "model.source", "adapter.kind", "adapter.rank")


def _configure(parser: argparse.ArgumentParser) -> None:
    add_kit(parser)
    since = "show what was written from this local date or time on, such as 2026-11-21 or 2026-11-21T20:00"
    parser.add_argument("--since", type=_moment, metavar="DATE", help=since)
    parser.add_argument("--verify", action="store_true", help="only say whether all lines fit; exit status 1 if not")
    add_json(parser)


def _run(arguments: argparse.Namespace) -> int:
    from client_app.audit.log import read_lines

    log = _log_of(Path(arguments.kit))
    lines = list(read_lines(log))
    shown = [] if arguments.verify else [line for line in lines if _is_since(line, arguments.since)]
    problem = next(((number, line) for number, line in enumerate(lines, start=1) if line.problem), None)
    if arguments.json:
        print_json(_as_json(lines, shown, problem))
    else:
        for line in shown:
            print(_told(line))
        print(_verdict(log, lines, problem))
    return DOES_NOT_FIT if problem or (arguments.verify and not lines) else FITS


def _log_of(place: Path) -> AuditLog:
    """Return the log of a site, whose kit or file is named."""
    from client_app.audit.notes import audit_log
    from client_app.site import load_site_config

    file = place / "site.toml" if place.is_dir() else place
    return audit_log(load_site_config(file))


def _moment(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text).astimezone()
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a date such as 2026-11-21, found {text!r}") from error


def _is_since(line: Line, since: datetime | None) -> bool:
    time = _time(line)
    return since is None or time is None or time >= since


def _time(line: Line) -> datetime | None:
    try:
        return datetime.fromisoformat(line.record["time"]).astimezone() if line.record else None
    except (KeyError, TypeError, ValueError):
        return None


def _told(line: Line) -> str:
    """Return a line for a person: when, what, about which run and round, and what matters of it."""
    record, time = line.record, _time(line)
    if record is None:
        return f"{'?':>7}  {line.file}:{line.number} is no record: {line.problem}"
    when = f"{time:%Y-%m-%d %H:%M:%S}" if time else "?"
    about = [str(record[name]) for name in ("run", "kind") if name in record]
    about += [f"round {record['round']}"] if "round" in record else []
    parts = [clean(" ".join(about)), *_details(record)]
    text = f"{record['number']:>7}  {when}  {clean(str(record.get('event'))):<10}  {'; '.join(filter(None, parts))}"
    return f"{text}  <-- {line.problem}" if line.problem else text


def _details(record: Any) -> Iterable[str]:
    match record.get("event"):
        case "received":
            settings, asked = record.get("settings", {}), record.get("asked", {})
            yield ", ".join(clean(str(settings[name])) for name in _SHOWN_SETTINGS if name in settings)
            yield f"{asked['num_sites']} sites" if asked.get("num_sites") else ""
            yield f"prompt {clean(asked['prompt'])!r}" if asked.get("prompt") else ""
        case "sending":
            to = record.get("to", {})
            address = f" to {clean(str(to['address']))}" if "address" in to else ""
            yield f"{human_bytes(record['bytes'])} over {clean(str(to.get('transport')))}{address}"
            yield f"sha256 {record['sha256'][:16]}"
        case "sent":
            yield clean(str(record.get("answer")))
            yield from (f"{name} {_number(value)}" for name, value in _flat(record.get("numbers", {})))
        case "refused" | "failed" | "unreadable":
            yield shorten(f"{clean(str(record.get('error')))}: {clean(str(record.get('reason')))}", _REASON_COLUMNS)
        case "torn":
            parts = record.get("fragments", [])
            yield ", ".join(f"{part['bytes']} bytes that a crash left at the end of {part['file']}" for part in parts)


def _flat(numbers: Any, prefix: str = "") -> Iterable[tuple[str, object]]:
    for name, value in numbers.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _number(value: object) -> str:
    return "not shared" if value is None else f"{value:g}" if isinstance(value, float) else clean(str(value))


def _verdict(log: AuditLog, lines: list[Line], problem: tuple[int, Line] | None) -> str:
    if not lines:
        return f"there is no audit log in {log.folder}"
    if problem:
        number, line = problem
        return f"line {number} ({line.file}:{line.number}) does not fit: {line.problem}"
    number, hash_ = _head(lines)
    return (
        f"all {len(lines)} lines fit; the last is record {number}, hash {hash_}\n"
        "Records cut off at the end would not show: note this hash elsewhere, and see later that a record still has it."
    )


def _head(lines: list[Line]) -> tuple[int, str]:
    record = lines[-1].record
    return (record["number"], record["hash"]) if record else (0, "")


def _as_json(lines: list[Line], shown: list[Line], problem: tuple[int, Line] | None) -> dict[str, object]:
    number, hash_ = _head(lines) if lines else (0, "")
    bad = {"line": problem[0], "file": problem[1].file, "reason": problem[1].problem} if problem else None
    records = [line.record for line in shown if line.record]
    return {"fits": not problem, "problem": bad, "last": {"number": number, "hash": hash_}, "records": records}


COMMAND = Command(
    "audit", "show what came to this site and what left it, and whether the log is whole", _configure, _run
)
