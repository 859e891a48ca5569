"""One training example: a conversation or a piece of plain text, with the labels that describe it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple


class Message(NamedTuple):
    """One turn of a conversation.

    Attributes:
        role: ``system``, ``user`` or ``assistant``.
        content: What was said.
    """

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """A conversation, or plain text where ``messages`` is empty.

    Attributes:
        messages: The turns in order.
        text: Plain text; empty for a conversation.
        attributes: Short labels such as ``topic`` and ``language``, by column name.
        origin: File and line that it came from, for error messages; not part of its identity.
    """

    messages: tuple[Message, ...] = ()
    text: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict, hash=False)
    origin: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        assert bool(self.messages) != bool(self.text), "an example is either a conversation or plain text"

    @cached_property
    def key(self) -> str:
        """SHA-256 of the content, 64 hexadecimal digits: equal for equal text, whatever its labels and origin."""
        content = json.dumps([self.messages, self.text], ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()


def distinct(examples: Iterable[Example]) -> list[Example]:
    """Return the first example of every key, in order."""
    first: dict[str, Example] = {}
    for example in examples:
        first.setdefault(example.key, example)
    return list(first.values())
