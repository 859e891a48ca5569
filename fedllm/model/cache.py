"""A cache of folders that several processes share: each is built once, whole or not at all, and checked when used.

An entry `<root>/<key>/` is written into a folder beside it, flushed to disk and renamed, so a reader sees a complete
entry or none. `meta.json` lists every file with size and checksum; an entry that does not fit its list (a full disk, a
power cut, a careless hand) is thrown away and built again. Builders of the same key wait for each other with a file lock;
where the file system knows no locks, both build and the first rename wins.

Evolution: :data:`FORMAT` counts up when what an entry holds changes; entries of another format are built again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash

from fedllm.errors import ModelError, explain

FORMAT = 1

Facts = Mapping[str, str | int | float | bool]
"""What a builder wants to know again without reading the files."""

_META = "meta.json"
_CHUNK_BYTES = 1 << 22
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """A complete, verified entry.

    Attributes:
        folder: Where its files are.
        facts: What its builder recorded.
        is_new: Whether this call built it.
    """

    folder: Path
    facts: Facts
    is_new: bool


def obtain(root: Path, key: str, build: Callable[[Path], Facts]) -> Entry:
    """Return the entry of a key, building it if it is missing or damaged.

    Args:
        root: Folder of the entries.
        key: Letters, digits and hyphens.
        build: Writes the entry's files into the folder given and returns its facts.

    Raises:
        ModelError: The cache folder cannot be written.
    """
    if found := find(root, key):
        return found
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _lock(root / f".{key}.lock") as is_alone:
            return find(root, key) or _build(root, key, build, is_alone)
    except OSError as error:
        raise ModelError(
            explain(
                "the model cache cannot be written",
                found=error,
                where=root,
                fix="Free some space, or point FEDLLM_CACHE (or the site's `cache_dir`) to a folder that can be written.",
            )
        ) from error


def find(root: Path, key: str) -> Entry | None:
    """Return the entry of a key if it is there and whole, else None."""
    folder = root / key
    if not folder.is_dir():
        return None
    if problem := damage(folder):
        _log.warning("cache entry %s is damaged (%s) and will be built again", folder, problem)
        return None
    return Entry(folder, json.loads((folder / _META).read_text(encoding="utf-8"))["facts"], is_new=False)


def damage(folder: Path) -> str | None:
    """Say what is wrong with an entry, or None.

    Every byte is read: at the 10 GB/s of XXH3 that costs less than reading the weights from the disk, and leaves them in
    the page cache, from where they are mapped next.
    """
    try:
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        body = meta["body"] if meta["format"] == FORMAT else None
        if body is None:
            return f"format {meta['format']}, this release writes {FORMAT}"
        if _checksum_text(_canonical(meta["facts"], body)) != meta["checksum"]:
            return f"{_META} does not fit its checksum"
        for name, (size, checksum) in body.items():
            if (folder / name).stat().st_size != size or _checksum(folder / name) != checksum:
                return f"{name} does not fit its size or checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _build(root: Path, key: str, build: Callable[[Path], Facts], is_alone: bool) -> Entry:
    if is_alone:
        _sweep(root, key)
    work = root / f".{key}.{uuid.uuid4().hex[:12]}.tmp"
    work.mkdir()
    try:
        _write_meta(work, build(work))
        _move_in(work, root / key)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    entry = find(root, key)
    if entry is None:
        raise OSError(f"{root / key} was written and cannot be read back: {damage(root / key)}")
    return Entry(entry.folder, entry.facts, is_new=True)


def _sweep(root: Path, key: str) -> None:
    """Remove what a killed builder left behind; only the holder of the lock may."""
    for leftover in root.glob(f".{key}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def _write_meta(folder: Path, facts: Facts) -> None:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    body = {path.name: [path.stat().st_size, _checksum(path)] for path in files}
    meta = {"format": FORMAT, "facts": facts, "body": body, "checksum": _checksum_text(_canonical(facts, body))}
    (folder / _META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
    for path in [*files, folder / _META, folder]:
        _flush(path)


def _move_in(work: Path, target: Path) -> None:
    """Rename the finished folder into place; an entry that is there already is damaged or equal."""
    try:
        work.rename(target)
    except OSError:
        if damage(target) is None:
            return  # another process was first
        aside = work.with_name(f"{work.name}.damaged.tmp")
        target.rename(aside)
        work.rename(target)
        shutil.rmtree(aside, ignore_errors=True)
    _flush(target.parent)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Hold a file lock, which the kernel frees however the process ends; yield False where there are no locks."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            _log.warning("no file locks in %s (%s); another process may build the same entry", path.parent, error)
            yield False
            return
        yield True


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checksum(path: Path) -> str:
    checksum = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            checksum.update(chunk)
    return checksum.hexdigest()


def _checksum_text(text: str) -> str:
    return xxhash.xxh3_128(text.encode()).hexdigest()


def _canonical(facts: object, body: object) -> str:
    return json.dumps([facts, body], sort_keys=True, separators=(",", ":"))
