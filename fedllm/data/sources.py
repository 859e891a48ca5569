"""Where examples come from: a file or folder, an installed package, or the Hugging Face hub.

A source is written ``scheme:address``. A new scheme is one function from an address and a home folder to rows::

    def read_sql(address: str, home: Path) -> list[Row]:
        ...

    register("sql", read_sql)

Nothing is imported from a package that only holds data, and nothing is downloaded except by ``hf:``.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from pathlib import Path
from typing import Protocol

from fedllm.data.examples import Example, distinct
from fedllm.data.files import READERS, Row, read_file
from fedllm.data.formats import to_examples
from fedllm.errors import DataError, explain

log = logging.getLogger(__name__)

_HUB_ADDRESS = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?(:(?P<split>.+))?")
_PACKAGE_ADDRESS = re.compile(r"(?P<package>[A-Za-z_]\w*)(/(?P<path>.+))?")


class Source(Protocol):
    """Reads all rows at an address; relative paths count from ``home``."""

    def __call__(self, address: str, home: Path) -> list[Row]:
        """Return the rows in a fixed order, at least one. Raises :class:`DataError`."""
        ...


def load_examples(source: str, format_: str, home: Path, *, deduplicate: bool = False) -> list[Example]:
    """Read all examples of a data source.

    Args:
        source: See :func:`load_rows`.
        format_: See :func:`fedllm.data.formats.to_examples`.
        home: Folder that relative paths count from.
        deduplicate: Keep only the first of examples with equal content.

    Raises:
        ConfigError: The format is unknown.
        DataError: The source cannot be read, or a row does not fit the format.
    """
    examples, report = to_examples(load_rows(source, home), format_)
    if report.num_unanswered or report.num_trimmed:
        left_out, trimmed = report.num_unanswered, report.num_trimmed
        log.info("%d of %d rows hold no answer, %d were cut after the last one", left_out, report.num_rows, trimmed)
    if not deduplicate:
        return examples
    kept = distinct(examples)
    log.info("%d of %d examples repeat another and are left out", len(examples) - len(kept), len(examples))
    return kept


def load_rows(source: str, home: Path) -> list[Row]:
    """Read all rows of a data source.

    Args:
        source: ``file:/path`` (a file, or a folder of which all files are read in sorted order),
            ``hf:org/name[@revision][:split]`` or ``pkg:package/path``.
        home: Folder that relative paths count from.

    Returns:
        Rows in a fixed order. Rows from a folder that lack them get the columns ``topic`` (the file's stem) and
        ``language`` (the name of the file's folder).

    Raises:
        DataError: The source is malformed, missing, unreachable, unreadable or empty.
    """
    scheme, colon, address = source.partition(":")
    reader = SOURCES.get(scheme) if colon and address else None
    if reader is None:
        expected = " or ".join(f"'{name}:...'" for name in SOURCES)
        raise DataError(
            explain("a data source is malformed", expected=expected, found=repr(source), where="data.source")
        )
    return reader(address, home)


def absolute(source: str, home: Path) -> str:
    """Return the source with a relative ``file:`` path made absolute from ``home``."""
    scheme, _, address = source.partition(":")
    return f"file:{home.absolute() / Path(address).expanduser()}" if scheme == "file" and address else source


def register(scheme: str, source: Source) -> None:
    """Add a scheme of data sources.

    Raises:
        ValueError: The scheme is taken.
    """
    if scheme in SOURCES:
        raise ValueError(explain("a data source's scheme is taken", found=repr(scheme)))
    SOURCES[scheme] = source


def read_path(address: str, home: Path) -> list[Row]:
    """Read a file, or every file under a folder."""
    path = home / Path(address).expanduser()
    return _read_folder(path) if path.is_dir() else read_file(path)


def read_package(address: str, home: Path) -> list[Row]:  # noqa: ARG001 (a source's signature)
    """Read a file or folder inside an installed package without importing the package."""
    match = _PACKAGE_ADDRESS.fullmatch(address)
    if match is None:
        raise DataError(
            explain("a package source is malformed", expected="'pkg:package/path'", found=f"'pkg:{address}'")
        )
    root = _package_folder(match["package"])
    path = (root / (match["path"] or ".")).resolve()
    if not path.is_relative_to(root) or not path.exists():
        raise DataError(explain("a package holds no such path", found=f"'pkg:{address}'", where=root))
    return read_path(str(path), root)


def read_hub(address: str, home: Path) -> list[Row]:  # noqa: ARG001 (a source's signature)
    """Read a data set of the Hugging Face hub, from the local cache where it is there."""
    match = _HUB_ADDRESS.fullmatch(address)
    if match is None:
        expected = "'hf:org/name@revision:split'"
        raise DataError(explain("a hub source is malformed", expected=expected, found=f"'hf:{address}'"))
    split = match["split"] or "train"
    try:
        import datasets

        rows = datasets.load_dataset(match["name"], revision=match["revision"], split=split)
    except Exception as error:
        fix = "Check the name, the split and the network; an offline site copies the files and uses file:/path."
        found = f"{type(error).__name__}: {error}"
        raise DataError(
            explain("a hub data set cannot be loaded", found=found, where=f"hf:{address}", fix=fix)
        ) from error
    if len(rows) == 0:
        raise DataError(explain("a hub data set is empty", where=f"hf:{address}"))
    return [Row(values, f"hf:{address}, row {number}") for number, values in enumerate(rows, start=1)]


SOURCES: dict[str, Source] = {"file": read_path, "hf": read_hub, "pkg": read_package}
"""Readers by scheme."""


def _read_folder(folder: Path) -> list[Row]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _is_hidden(path, folder)]
    known = [path for path in files if path.suffix.lower() in READERS]
    others = [path.name for path in files if path.suffix.lower() not in READERS]
    if others:
        log.warning("%d files under %s are not data and are left out, for example %s", len(others), folder, others[0])
    if not known:
        raise DataError(explain("a folder holds no data file", expected=f"files {', '.join(READERS)}", where=folder))
    return [_labelled(row, path) for path in known for row in read_file(path)]


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)


def _labelled(row: Row, path: Path) -> Row:
    return Row({"topic": path.stem, "language": path.absolute().parent.name, **row.values}, row.origin)


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        found = "a single module" if spec else "nothing of that name"
        fix = f"Install the package that provides {package!r}, or name another data.source."
        raise DataError(
            explain(
                "a data package is not there",
                expected="an installed package",
                found=found,
                where=f"pkg:{package}",
                fix=fix,
            )
        )
    return Path(spec.submodule_search_locations[0]).resolve()
