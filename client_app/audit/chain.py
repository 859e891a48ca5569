"""Records that hold each other: every line of the audit log carries the hash of the one before.

A line is one JSON object in canonical form (sorted keys, no spaces, ASCII) and a line feed. ``number`` counts from 1,
``previous`` is the hash of the record before (64 zeros for the first), and ``hash`` is the SHA-256 of the canonical form of
everything else in the record. A line that was altered, left out, put in or moved therefore no longer fits, nor does any
other spelling of the same record.

What a chain cannot show: that records at the end were cut off, or that the whole log was written anew by somebody who can
write the file. Whoever notes the last hash somewhere else can tell both.

Evolution: later releases add keys; those that exist keep their meaning, and the canonical form and the hash stay.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GENESIS = "0" * 64
"""What stands for the hash before the first record."""

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Link:
    """A place in the chain: the record of this number has this hash."""

    number: int = 0
    hash: str = GENESIS


def sealed(fields: Record, after: Link) -> tuple[bytes, Link]:
    """Return the line of a record that follows a link, and its own link.

    Args:
        fields: JSON values by name, none of them ``number``, ``previous`` or ``hash``.
        after: The record before.
    """
    body = {**fields, "number": after.number + 1, "previous": after.hash}
    link = Link(after.number + 1, _hash(body))
    return _canonical({**body, "hash": link.hash}) + b"\n", link


def unsealed(line: bytes) -> Record | None:
    """Return the record of a line without its line feed, None if the line is not one as :func:`sealed` writes it."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("number"), int):
        return None
    body = {name: value for name, value in record.items() if name != "hash"}
    return record if record.get("hash") == _hash(body) and _canonical(record) == line else None


def link_of(record: Record) -> Link:
    """Return a record's place."""
    return Link(record["number"], record["hash"])


def follows(record: Record, link: Link) -> bool:
    """Tell whether a record is the one after a link."""
    return bool(record["number"] == link.number + 1 and record.get("previous") == link.hash)


def _hash(body: Record) -> str:
    return hashlib.sha256(_canonical(body)).hexdigest()


def _canonical(value: Record) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")
