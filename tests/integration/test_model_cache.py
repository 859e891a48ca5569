"""The cache of built folders, shared by processes that may race, die, or find damage."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from fedllm.errors import ModelError
from fedllm.model import cache

SIZE = 1 << 20


def build_payload(folder: Path) -> cache.Facts:
    (folder / "payload").write_bytes(bytes(range(256)) * (SIZE // 256))
    (folder / "notes").write_text("built")
    return {"answer": 42}


def counting_builder(counter: Path, pause_s: float) -> object:
    def build(folder: Path) -> cache.Facts:
        with counter.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(pause_s)
        return build_payload(folder)

    return build


def obtain_in_process(root: Path, counter: Path, barrier: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    entry = cache.obtain(root, "key", counting_builder(counter, 0.3))  # type: ignore[arg-type]
    assert cache.damage(entry.folder) is None


def start(*arguments: object) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=obtain_in_process, args=arguments)
    process.start()
    return process


def leftovers(root: Path) -> list[str]:
    return [path.name for path in root.iterdir() if path.name.endswith(".tmp")]


def test_an_entry_is_built_once_and_found_again(tmp_path: Path) -> None:
    first = cache.obtain(tmp_path, "key", build_payload)
    second = cache.obtain(tmp_path, "key", lambda _: pytest.fail("built twice"))
    assert (first.is_new, second.is_new) == (True, False)
    assert first.folder == second.folder == tmp_path / "key"
    assert second.facts == {"answer": 42}
    assert (second.folder / "payload").stat().st_size == SIZE
    assert not leftovers(tmp_path)


def test_processes_that_race_build_once_and_all_get_the_entry(tmp_path: Path) -> None:
    barrier = multiprocessing.get_context("fork").Barrier(3)
    processes = [start(tmp_path / "root", tmp_path / "count", barrier) for _ in range(3)]
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len((tmp_path / "count").read_text().split()) == 1
    assert not leftovers(tmp_path / "root")


def test_processes_that_race_without_locks_all_get_a_whole_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError("this file system has no locks")

    monkeypatch.setattr(cache.fcntl, "flock", no_locks)
    barrier = multiprocessing.get_context("fork").Barrier(3)
    processes = [start(tmp_path / "root", tmp_path / "count", barrier) for _ in range(3)]
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len((tmp_path / "count").read_text().split()) == 3
    assert cache.find(tmp_path / "root", "key") is not None
    assert not leftovers(tmp_path / "root")


def test_a_killed_builder_leaves_nothing_that_is_taken_for_an_entry(tmp_path: Path) -> None:
    def build_for_ever(root: Path) -> None:
        def build(folder: Path) -> cache.Facts:
            build_payload(folder)
            (root / "started").touch()
            time.sleep(60)
            return {}

        cache.obtain(root, "key", build)

    tmp_path.joinpath("root").mkdir()
    process = multiprocessing.get_context("fork").Process(target=build_for_ever, args=(tmp_path / "root",))
    process.start()
    while not (tmp_path / "root" / "started").exists():
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    assert leftovers(tmp_path / "root")
    assert cache.find(tmp_path / "root", "key") is None
    assert cache.obtain(tmp_path / "root", "key", build_payload).is_new
    assert not leftovers(tmp_path / "root"), "the next builder sweeps up"


def spoil(folder: Path, kind: str) -> None:
    payload, meta = folder / "payload", folder / "meta.json"
    if kind == "truncated":
        os.truncate(payload, SIZE // 2)
    elif kind == "bit":
        content = bytearray(payload.read_bytes())
        content[SIZE // 2] ^= 1
        payload.write_bytes(content)
    elif kind == "missing":
        payload.unlink()
    elif kind == "no meta":
        meta.unlink()
    elif kind == "half meta":
        meta.write_text(meta.read_text()[:40])
    elif kind == "facts":
        meta.write_text(meta.read_text().replace("42", "43"))
    elif kind == "format":
        meta.write_text(json.dumps({**json.loads(meta.read_text()), "format": 0}))


@pytest.mark.parametrize("kind", ["truncated", "bit", "missing", "no meta", "half meta", "facts", "format"])
def test_a_damaged_entry_is_noticed_and_built_again(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = cache.obtain(tmp_path, "key", build_payload).folder
    spoil(folder, kind)
    assert cache.find(tmp_path, "key") is None
    assert "damaged" in caplog.text
    again = cache.obtain(tmp_path, "key", build_payload)
    assert again.is_new
    assert cache.damage(again.folder) is None
    assert again.facts == {"answer": 42}
    assert not leftovers(tmp_path)


def test_a_builder_that_fails_leaves_no_trace_and_its_error_is_kept(tmp_path: Path) -> None:
    def build(folder: Path) -> cache.Facts:
        (folder / "half").write_text("half")
        raise ModelError("the base is broken")

    with pytest.raises(ModelError, match="the base is broken"):
        cache.obtain(tmp_path, "key", build)
    assert cache.find(tmp_path, "key") is None
    assert not leftovers(tmp_path)


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ModelError, match=r"cache cannot be written.*FEDLLM_CACHE"):
        cache.obtain(tmp_path / "file" / "root", "key", build_payload)
