"""Rows from one file: JSON lines, JSON, CSV, Parquet, YAML and plain text.

A row is a mapping from column to value, with the place that it came from. YAML scalars stay the text that was written
(``Yes`` is not a truth value in a dialogue). A JSON or YAML file may also have the shape of chatterbot-corpus,
``conversations: [[utterance, ...], ...]``; each conversation becomes one row of alternating messages.

Error messages name files, lines and columns, never values: they may reach people who must not see the data.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.errors import DataError, explain


@dataclass(frozen=True)
class Row:
    """One record as it was found.

    Attributes:
        values: Its columns.
        origin: Where it was found, for example ``faq.jsonl, line 3``.
    """

    values: Mapping[str, Any]
    origin: str


def read_file(path: Path) -> list[Row]:
    """Read all rows of one file; its suffix decides how (see :data:`READERS`).

    Raises:
        DataError: The file is missing, of an unknown kind, unreadable, or holds no row.
    """
    if not path.is_file():
        raise DataError(explain("a data file does not exist", where=path, fix="Check data.source."))
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            explain("a data file is of an unknown kind", expected=", ".join(READERS), found=path.suffix, where=path)
        )
    try:
        rows = list(reader(path))
    except OSError as error:
        raise DataError(explain("a data file cannot be read", found=error.strerror or error, where=path)) from error
    if not rows:
        raise DataError(explain("a data file is empty", expected="at least one row", where=path))
    return rows


def _read_json_lines(path: Path) -> Iterator[Row]:
    # Only "\n" ends a line: str.splitlines would also cut at U+2028, which JSON strings may hold.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            origin = f"{path}, line {number}"
            yield _record(_parse_json(line, origin), origin)


def _read_json(path: Path) -> Iterator[Row]:
    text = _text(path)
    return _document(_parse_json(text, str(path)), path) if text.strip() else iter(())


def _read_yaml(path: Path) -> Iterator[Row]:
    import yaml

    # BaseLoader builds text, lists and mappings only, so nothing is executed and `Yes` stays "Yes".
    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
    try:
        document = yaml.load(_text(path), Loader=loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        origin = f"{path}, line {mark.line + 1}" if mark else str(path)
        # PyYAML quotes the text it stumbles over, so only the kind of its error is passed on.
        raise DataError(explain("a data file is not YAML", found=type(error).__name__, where=origin)) from error
    return _document(document, path) if document else iter(())


def _read_separated(path: Path, delimiter: str) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), delimiter=delimiter, strict=True)
    try:
        for values in reader:
            origin = f"{path}, line {reader.line_num}"
            if None in values or None in values.values():
                expected = f"{len(reader.fieldnames or ())} columns as in the header"
                raise DataError(explain("a row has too few or too many columns", expected=expected, where=origin))
            yield Row(values, origin)
    except csv.Error as error:
        raise DataError(
            explain("a data file is not CSV", found=error, where=f"{path}, line {reader.reader.line_num}")
        ) from error


def _read_csv(path: Path) -> Iterator[Row]:
    return _read_separated(path, ",")


def _read_tsv(path: Path) -> Iterator[Row]:
    return _read_separated(path, "\t")


def _read_parquet(path: Path) -> Iterator[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            records = [record for batch in file.iter_batches() for record in batch.to_pylist()]
    except ArrowException as error:
        raise DataError(explain("a data file is not Parquet", found=error, where=path)) from error
    return (Row(record, f"{path}, row {number}") for number, record in enumerate(records, start=1))


def _read_paragraphs(path: Path) -> Iterator[Row]:
    paragraphs = re.split(r"\n\s*\n", _text(path).replace("\r\n", "\n"))
    kept = (paragraph.strip() for paragraph in paragraphs if paragraph.strip())
    return (Row({"text": text}, f"{path}, paragraph {number}") for number, text in enumerate(kept, start=1))


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".yml": _read_yaml,
    ".yaml": _read_yaml,
    ".txt": _read_paragraphs,
}
"""How a file is read, by lower-case suffix. Plain text gives one row a paragraph; a blank line ends a paragraph."""


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"another encoding at byte {error.start}"
        raise DataError(explain("a data file is not UTF-8 text", found=found, where=path)) from error


def _parse_json(text: str, origin: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(explain("data is not JSON", found=error, where=origin)) from error


def _document(document: object, path: Path) -> Iterator[Row]:
    if isinstance(document, dict) and isinstance(document.get("conversations"), list):
        return _conversations(document["conversations"], path)
    if isinstance(document, list):
        return (_record(item, f"{path}, row {number}") for number, item in enumerate(document, start=1))
    raise DataError(
        explain(
            "a data file has another shape", expected="a list of records, or `conversations: [[...], ...]`", where=path
        )
    )


def _record(item: object, origin: str) -> Row:
    if not isinstance(item, dict):
        raise DataError(
            explain("a row is malformed", expected="columns with values", found=type(item).__name__, where=origin)
        )
    return Row(item, origin)


def _conversations(conversations: Iterable[object], path: Path) -> Iterator[Row]:
    for number, conversation in enumerate(conversations, start=1):
        utterances = conversation if isinstance(conversation, list) else [conversation]
        messages = [
            {"role": "assistant" if turn % 2 else "user", "content": _utterance(entry)}
            for turn, entry in enumerate(utterances)
        ]
        yield Row({"messages": messages}, f"{path}, conversation {number}")


def _utterance(entry: object) -> str:
    # An unquoted `Note: see below` is a mapping in YAML and text to its author.
    if isinstance(entry, dict):
        return ", ".join(f"{key}: {value}" for key, value in entry.items())
    return str(entry)
