"""The audit log's files: appended to under a lock, brought to the disk at once, never rewritten.

::

    <state_dir>/audit/
        audit-000001.jsonl     records, see :mod:`client_app.audit.chain`
        audit-000002.jsonl     goes on where the one before ended
        lock

One log serves all runs of a site. A file that has grown large is followed by the next; the chain goes on. A crash can leave
a part of a line at the end of a file. It stays where it is: the next record opens a new file and says how many bytes were
left and what their digest is, so the part is accounted for and cannot be changed later either. A whole line that is no
record, on the other hand, was not left by a crash, and nothing is appended behind it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

from client_app.audit.chain import Link, Record, follows, link_of, sealed, unsealed
from fedllm.errors import AuditError, explain
from fedllm.files import locked, sync_folder

FOLDER = "audit"
TORN = "torn"
"""Kind of the record that accounts for what a crash left."""

MAX_FILE_BYTES = 16 << 20
_BLOCK_BYTES = 1 << 16


class AuditLog:
    """The log of one site.

    Args:
        folder: Where its files are; made when first written to.
        max_file_bytes: Size from which on the next file is begun.
    """

    def __init__(self, folder: Path, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        self.folder, self._max_file_bytes = folder, max_file_bytes

    def append(self, event: str, **fields: object) -> Link:
        """Write one record and return its place; it is on the disk when this returns.

        Args:
            event: What happened.
            fields: JSON values by name.

        Raises:
            AuditError: It cannot be written, or the log's last line is not a record.
        """
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with locked(self.folder / "lock"):
                return self._append({"event": event, **fields})
        except OSError as error:
            fix = "The site's admin must make room or fix permissions; nothing is done that cannot be written down."
            problem = "the audit log cannot be written"
            raise AuditError(explain(problem, found=error.strerror, where=self.folder.name, fix=fix)) from error

    @property
    def files(self) -> list[Path]:
        """The log's files in order."""
        return sorted(self.folder.glob("audit-*.jsonl"))

    def _append(self, fields: dict[str, Any]) -> Link:
        link, file, fragments = self._end()
        if fragments:
            file = self._next(file)
            link = _write(file, {"time": _now(), "event": TORN, "fragments": fragments}, link)
        elif file is None or file.stat().st_size >= self._max_file_bytes:
            file = self._next(file)
        assert file is not None, "a log without files gets its first one"
        return _write(file, {"time": _now(), **fields}, link)

    def _end(self) -> tuple[Link, Path | None, list[dict[str, object]]]:
        """Return the last record's place, the last file, and what crashes left behind that record."""
        fragments: list[dict[str, object]] = []
        files = self.files
        for file in reversed(files):
            line, rest = _tail(file)
            if rest:
                fragments.insert(0, fragment_of(file.name, rest))
            if line is not None:
                record = unsealed(line)
                if record is None:
                    raise self._damaged(file)
                return link_of(record), files[-1], fragments
        return Link(), files[-1] if files else None, fragments

    def _next(self, file: Path | None) -> Path:
        number = int(file.stem.removeprefix("audit-")) + 1 if file else 1
        return self.folder / f"audit-{number:06d}.jsonl"

    def _damaged(self, file: Path) -> AuditError:
        fix = "The site's admin should look at it with `fedllm site audit --verify`, then move the folder away."
        return AuditError(explain("the audit log's last line is not a record", where=file.name, fix=fix))


def fragment_of(file: str, content: bytes) -> dict[str, object]:
    """Return how a part of a line is accounted for."""
    return {"file": file, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _write(file: Path, fields: Record, after: Link) -> Link:
    is_new = not file.exists()
    line, link = sealed(fields, after)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        while line:
            line = line[os.write(descriptor, line) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if is_new:
        sync_folder(file.parent)
    return link


def _tail(file: Path) -> tuple[bytes | None, bytes]:
    """Return a file's last whole line without its line feed, None where there is none, and what follows it."""
    with file.open("rb") as opened:
        size = opened.seek(0, os.SEEK_END)
        for doubled in count():
            start = opened.seek(max(0, size - (_BLOCK_BYTES << doubled)))
            body, feed, rest = opened.read(size - start).rpartition(b"\n")
            if feed and (start == 0 or b"\n" in body):
                return body.rpartition(b"\n")[2], rest
            if start == 0:
                return None, rest
    raise AssertionError("a block becomes as large as the file")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass(frozen=True)
class Line:
    """One line of the log.

    Attributes:
        file: Name of its file.
        number: Its number in the file, from 1.
        record: What it says, None if it is no record.
        problem: Why it does not fit, empty if it does.
    """

    file: str
    number: int
    record: Record | None
    problem: str = ""


def read_lines(log: AuditLog) -> Iterator[Line]:
    """Yield the log's lines in order, each held against those before it; what a crash left is no line.

    Raises:
        AuditError: A file cannot be read.
    """
    link, fragments, place = Link(), list[dict[str, object]](), ("", 0)
    for file in log.files:
        *lines, rest = _content(file).split(b"\n")
        for number, line in enumerate(lines, start=1):
            record = unsealed(line)
            problem = _problem(record, link, fragments)
            if record is not None:
                link, fragments = link_of(record), []
            yield Line(file.name, number, record, problem)
        if rest:
            fragments.append(fragment_of(file.name, rest))
            place = (file.name, len(lines) + 1)
    if fragments:
        problem = "it is incomplete: a crash left it so, which the next record will note, or it was cut or altered"
        yield Line(*place, None, problem)


def _problem(record: Record | None, link: Link, fragments: list[dict[str, object]]) -> str:
    if record is None:
        return "it is not as it was written: altered, or cut"
    if not follows(record, link):
        expected = f"record {link.number + 1} after {link.hash[:16]}"
        found = f"record {record['number']} after {str(record.get('previous'))[:16]}"
        return f"records before it are missing, added or in another order: expected {expected}, found {found}"
    if fragments != (record.get("fragments") if record.get("event") == TORN else []):
        return "the end of the file before is not as it was left: altered, or cut"
    return ""


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise AuditError(explain("the audit log cannot be read", found=error.strerror, where=file)) from error
