"""The audit log: what is written is read, and nothing can be changed in it unseen."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client_app.audit.chain import GENESIS, Link, sealed, unsealed
from client_app.audit.log import AuditLog, Line, read_lines
from fedllm.errors import AuditError

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
names = st.text(min_size=1, max_size=6).filter(lambda name: name not in ("number", "previous", "hash"))
records = st.dictionaries(names, values, max_size=4)


def filled(folder: Path, count: int = 8, max_file_bytes: int = 600) -> AuditLog:
    """Write a log of several files."""
    log = AuditLog(folder, max_file_bytes)
    for number in range(count):
        log.append("sent", round=number, loss=number / 3, reason="Grüße\n")
    return log


def first_problem(log: AuditLog) -> Line | None:
    return next((line for line in read_lines(log) if line.problem), None)


@settings(deadline=None)
@given(records, st.integers(0, 10**6))
def test_a_record_comes_back_as_it_was_sealed(fields: dict[str, Any], number: int) -> None:
    line, link = sealed(fields, Link(number, GENESIS))
    record = unsealed(line.removesuffix(b"\n"))
    assert record is not None
    assert {name: record[name] for name in fields} == json.loads(json.dumps(fields))
    assert (record["number"], record["previous"], record["hash"]) == (number + 1, GENESIS, link.hash)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_no_other_bytes_are_a_record(content: bytes) -> None:
    assert unsealed(content) is None


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    log = filled(tmp_path_factory.mktemp("original"))
    assert len(log.files) > 2
    assert first_problem(log) is None
    return {file.name: file.read_bytes() for file in log.files}


def changed(folder: Path, files: dict[str, bytes]) -> AuditLog:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return AuditLog(folder)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_changed_byte_is_found_on_its_line(
    data: st.DataObject, original: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    name = data.draw(st.sampled_from(sorted(original)))
    content = original[name]
    at = data.draw(st.integers(0, len(content) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda value: value != content[at]))
    new = content[:at] + bytes([byte]) + content[at + 1 :]
    problem = first_problem(changed(tmp_path_factory.getbasetemp() / "byte", {**original, name: new}))
    assert problem is not None
    number = content[:at].count(b"\n") + 1
    if content[at : at + 1] != b"\n" or number < content.count(b"\n"):
        assert (problem.file, problem.number) == (name, number)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_lines_that_are_moved_left_out_or_doubled_are_found(
    data: st.DataObject, original: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    places = [(name, at) for name in sorted(original) for at in range(original[name].count(b"\n"))]
    lines = [line for name in sorted(original) for line in original[name].splitlines(keepends=True)]
    here, there = sorted(data.draw(st.lists(st.integers(0, len(lines) - 1), min_size=2, max_size=2, unique=True)))
    how = data.draw(st.sampled_from(["swap", "leave out", "double"]))
    new = list(lines)
    if how == "swap":
        new[here], new[there] = lines[there], lines[here]
    else:
        new[here] = b"" if how == "leave out" else lines[here] * 2
    files = {name: b"".join(new[i] for i, (owner, _) in enumerate(places) if owner == name) for name in original}
    problem = first_problem(changed(tmp_path_factory.getbasetemp() / "lines", files))
    assert problem is not None
    assert "in another order" in problem.problem


def test_a_file_that_is_missing_is_found_and_one_that_was_cut_at_the_end_of_all_is_not(
    original: dict[str, bytes], tmp_path: Path
) -> None:
    names = sorted(original)
    for missing in names[:-1]:
        folder = tmp_path / missing
        assert first_problem(changed(folder, {n: c for n, c in original.items() if n != missing})) is not None
    shorter = changed(tmp_path / "cut", {name: original[name] for name in names[:-1]})
    assert first_problem(shorter) is None, "a chain cannot show it; the last hash, noted elsewhere, does"


@given(cut=st.integers(1, 300))
@settings(max_examples=15, deadline=None)
def test_a_line_that_a_crash_tore_is_told_then_noted_and_cannot_be_changed_later(
    cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    log = filled(tmp_path_factory.mktemp("torn"), count=2, max_file_bytes=10**6)
    [file] = log.files
    length = len(file.read_bytes().splitlines(keepends=True)[-1])
    cut = min(cut, length - 1)
    os.truncate(file, file.stat().st_size - cut)
    problem = first_problem(log)
    assert problem is not None
    assert "incomplete" in problem.problem
    log.append("received")
    kept = [line.record for line in read_lines(log) if line.record]
    assert first_problem(log) is None
    assert [record["event"] for record in kept] == ["sent", "torn", "received"]
    assert kept[1]["fragments"][0]["bytes"] == length - cut
    left = file.read_bytes()
    file.write_bytes(left[:-1] + bytes([left[-1] ^ 1]))
    assert first_problem(log) is not None
    file.write_bytes(left[:-1])
    assert first_problem(log) is not None


def test_crashes_on_crashes_are_all_noted(tmp_path: Path) -> None:
    log = filled(tmp_path, count=1)
    (tmp_path / "audit-000002.jsonl").write_bytes(b'{"half')
    (tmp_path / "audit-000003.jsonl").write_bytes(b"")
    (tmp_path / "audit-000004.jsonl").write_bytes(b"\0\0\0")
    link = log.append("received")
    assert (link.number, first_problem(log)) == (3, None)
    torn = [line.record for line in read_lines(log) if line.record][1]
    assert [(part["file"], part["bytes"]) for part in torn["fragments"]] == [
        ("audit-000002.jsonl", 6),
        ("audit-000004.jsonl", 3),
    ]


def test_nothing_is_appended_behind_a_whole_line_that_is_no_record(tmp_path: Path) -> None:
    log = filled(tmp_path, count=1)
    [file] = log.files
    file.write_bytes(file.read_bytes().replace(b'"round":0', b'"round":9'))
    with pytest.raises(AuditError, match=r"last line is not a record.*fedllm site audit --verify"):
        log.append("received")


def test_a_record_longer_than_a_block_is_found_again(tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    log.append("received", text="x" * 200_000)
    assert log.append("sent").number == 2
    assert first_problem(log) is None


def test_only_the_owner_can_read_the_log(tmp_path: Path) -> None:
    log = filled(tmp_path / "audit", count=1)
    assert {path.stat().st_mode & 0o077 for path in [log.folder, *log.folder.iterdir()]} == {0}


def _append_many(folder: Path, name: str, count: int) -> None:
    log = AuditLog(folder, max_file_bytes=4000)
    for number in range(count):
        log.append("sent", writer=name, index=number)


def test_processes_that_write_at_the_same_time_make_one_chain(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append_many, args=(tmp_path, name, 30)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    lines = list(read_lines(AuditLog(tmp_path)))
    assert not [line for line in lines if line.problem]
    for name in "ab":
        own = [line.record["index"] for line in lines if line.record and line.record["writer"] == name]
        assert own == list(range(30))
