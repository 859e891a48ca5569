"""From rows to examples: the known shapes of a training row.

========================= ============================================== ===========================================
format                    columns                                        becomes
========================= ============================================== ===========================================
``messages``              ``messages``: list of ``{role, content}``, or  the conversation
                          ``conversations``: list of ``{from, value}``
``alpaca``                ``instruction``, ``output``, maybe ``input``   instruction and input asked, output answered
``prompt-completion``     ``prompt``, ``completion``                     prompt asked, completion answered
``text``                  ``text``                                       plain text, all of it trained on
========================= ============================================== ===========================================

Other columns with short values become the example's attributes. Turns after the last answer teach nothing and are cut
off; a conversation without an answer is left out. Both are counted.

Error messages name rows and columns, never values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fedllm.data.examples import Example, Message
from fedllm.data.files import Row
from fedllm.errors import ConfigError, DataError, explain

MAX_ATTRIBUTE_LENGTH = 64
"""Longest value, in characters, that is taken as a label; anything longer is content."""

_ROLES = {"system": "system", "user": "user", "human": "user"} | dict.fromkeys(
    ("assistant", "gpt", "chatgpt", "model"), "assistant"
)


@dataclass(frozen=True)
class RowFormat:
    """One shape of a row.

    Attributes:
        columns: Alternatives; a row has this format if it holds all columns of one of them.
        optional: Further columns that the format reads.
        read: From the row's values to messages, or to plain text. Raises :class:`DataError` with what was expected.
    """

    columns: tuple[frozenset[str], ...]
    read: Callable[[Mapping[str, Any]], tuple[Message, ...] | str]
    optional: frozenset[str] = frozenset()

    def fits(self, columns: Iterable[str]) -> bool:
        """Say whether a row with these columns can have this format."""
        present = set(columns)
        return any(needed <= present for needed in self.columns)

    @property
    def reads(self) -> frozenset[str]:
        """Every column that holds content and not a label."""
        return self.optional.union(*self.columns)


@dataclass(frozen=True)
class FormatReport:
    """What became of the rows.

    Attributes:
        num_rows: Rows read.
        num_unanswered: Rows left out because nobody answers in them.
        num_trimmed: Conversations of which turns after the last answer were cut off.
    """

    num_rows: int
    num_unanswered: int
    num_trimmed: int


def to_examples(rows: list[Row], format_: str = "auto") -> tuple[list[Example], FormatReport]:
    """Turn rows into examples.

    Args:
        rows: What a source gave.
        format_: A name in :data:`FORMATS`, or ``auto`` to detect each row's format from its columns.

    Raises:
        ConfigError: The format is unknown.
        DataError: A row does not fit, or no row holds an answer.
    """
    if format_ != "auto" and format_ not in FORMATS:
        expected = ", ".join(("auto", *FORMATS))
        raise ConfigError(explain("unknown data format", expected=expected, found=repr(format_), where="data.format"))
    examples: list[Example] = []
    num_trimmed = 0
    for row in rows:
        row_format = FORMATS[detect(row) if format_ == "auto" else format_]
        content = _read(row, row_format)
        answered = content if isinstance(content, str) else _until_last_answer(content)
        if answered:
            examples.append(_example(answered, row, row_format))
            num_trimmed += len(answered) < len(content)
    if not examples:
        raise DataError(explain("no row holds an answer to learn from", found=f"{len(rows)} rows without one"))
    return examples, FormatReport(len(rows), len(rows) - len(examples), num_trimmed)


def detect(row: Row) -> str:
    """Return the name of the first format that a row's columns fit.

    Raises:
        DataError: It fits none.
    """
    for name, row_format in FORMATS.items():
        if row_format.fits(row.values):
            return name
    raise _misfit(row, "any known format", [f"{name} ({_needs(each)})" for name, each in FORMATS.items()])


def register(name: str, row_format: RowFormat) -> None:
    """Add a row format.

    Raises:
        ValueError: The name is taken.
    """
    if name in FORMATS or name == "auto":
        raise ValueError(explain("a data format's name is taken", found=repr(name)))
    FORMATS[name] = row_format


def _read(row: Row, row_format: RowFormat) -> tuple[Message, ...] | str:
    if not row_format.fits(row.values):
        raise _misfit(row, "data.format", [_needs(row_format)])
    try:
        return row_format.read(row.values)
    except DataError as error:
        raise DataError(
            explain("a row does not fit its format", expected=error, found=_columns(row), where=row.origin)
        ) from error


def _misfit(row: Row, what: str, needs: list[str]) -> DataError:
    fix = "Rename the columns, or set data.format."
    return DataError(
        explain(f"a row does not fit {what}", expected="; ".join(needs), found=_columns(row), where=row.origin, fix=fix)
    )


def _needs(row_format: RowFormat) -> str:
    return " or ".join(" and ".join(sorted(columns)) for columns in row_format.columns)


def _columns(row: Row) -> str:
    return f"columns {', '.join(sorted(map(str, row.values)))}"


def _until_last_answer(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    answers = (i for i, each in enumerate(messages, start=1) if each.role == "assistant" and each.content.strip())
    end = max(answers, default=0)
    asked = any(message.role != "assistant" for message in messages[:end])
    return messages[:end] if asked else ()


def _example(content: tuple[Message, ...] | str, row: Row, row_format: RowFormat) -> Example:
    others = {name: value for name, value in row.values.items() if name not in row_format.reads}
    attributes = {
        str(name): str(value)
        for name, value in others.items()
        if isinstance(value, str | int | float) and len(str(value)) <= MAX_ATTRIBUTE_LENGTH
    }
    if isinstance(content, str):
        return Example(text=content, attributes=attributes, origin=row.origin)
    return Example(messages=content, attributes=attributes, origin=row.origin)


def _read_messages(values: Mapping[str, Any]) -> tuple[Message, ...]:
    if "messages" in values:
        return _turns(values["messages"], "messages", "role", "content")
    return _turns(values["conversations"], "conversations", "from", "value")


def _turns(turns: object, column: str, role: str, content: str) -> tuple[Message, ...]:
    if not isinstance(turns, list | tuple):
        raise DataError(f"{column} to be a list of {{{role}, {content}}}")
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping) or not isinstance(turn.get(content), str):
            raise DataError(f"{column}[{number}] to hold {role} and {content} as text")
        if str(turn.get(role)) not in _ROLES:
            raise DataError(f"{column}[{number}].{role} to be one of {', '.join(_ROLES)}")
        messages.append(Message(_ROLES[turn[role]], turn[content]))
    return tuple(messages)


def _read_alpaca(values: Mapping[str, Any]) -> tuple[Message, ...]:
    instruction, extra = _string(values, "instruction"), values.get("input") or ""
    if not isinstance(extra, str):
        raise DataError("input to be text")
    question = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    return _asked_and_answered(question, _string(values, "output"))


def _read_prompt_completion(values: Mapping[str, Any]) -> tuple[Message, ...]:
    return _asked_and_answered(_string(values, "prompt"), _string(values, "completion"))


def _read_text(values: Mapping[str, Any]) -> str:
    text = _string(values, "text")
    return text if text.strip() else ""


def _asked_and_answered(question: str, answer: str) -> tuple[Message, ...]:
    return Message("user", question), Message("assistant", answer)


def _string(values: Mapping[str, Any], column: str) -> str:
    value = values[column]
    if not isinstance(value, str):
        raise DataError(f"{column} to be text")
    return value


FORMATS: dict[str, RowFormat] = {
    "messages": RowFormat((frozenset({"messages"}), frozenset({"conversations"})), _read_messages),
    "alpaca": RowFormat((frozenset({"instruction", "output"}),), _read_alpaca, frozenset({"input"})),
    "prompt-completion": RowFormat((frozenset({"prompt", "completion"}),), _read_prompt_completion),
    "text": RowFormat((frozenset({"text"}),), _read_text),
}
"""Row formats by name; detection takes the first that fits."""
