import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm import files
from fedllm.config import RunConfig
from fedllm.errors import CheckpointError, ConfigError
from fedllm.files import atomic_write
from fedllm.runs import Manifest, RunFolder, SiteCounts, git_revision, list_runs, read_metrics, versions


def make_run(home: Path, name: str, created: str) -> RunFolder:
    folder = RunFolder.create(home, name)
    Manifest.of(name, RunConfig(), created=created).write(folder.manifest)
    return folder


def test_a_new_run_gets_a_folder_and_its_files_lie_inside(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "first")
    assert folder.path == tmp_path / "runs" / "first"
    assert folder.checkpoints.is_dir()
    places = [
        folder.manifest,
        folder.metrics,
        folder.tensorboard,
        folder.adapter,
        folder.best,
        folder.report,
        folder.lock,
    ]
    assert all(place.parent == folder.path for place in places)
    assert RunFolder.open(tmp_path, "first") == folder


def test_a_name_that_is_taken_is_refused_and_the_error_says_how_to_resume(tmp_path: Path) -> None:
    make_run(tmp_path, "first", "2026-01-01T00:00:00+00:00")
    with pytest.raises(CheckpointError, match='resume="first"'):
        RunFolder.create(tmp_path, "first")


def test_an_empty_folder_of_the_name_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "runs" / "first").mkdir(parents=True)
    assert RunFolder.create(tmp_path, "first").path.is_dir()


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "-flag", "with space", "x" * 101, "new\nline", "ü"])
def test_a_name_that_could_leave_the_folder_or_confuse_a_shell_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError):
        RunFolder.create(tmp_path, name)
    with pytest.raises(ConfigError):
        RunFolder.open(tmp_path, name)
    assert not list(tmp_path.iterdir())


def test_an_unknown_run_is_refused_with_the_nearest_known_name(tmp_path: Path) -> None:
    make_run(tmp_path, "baseline", "2026-01-01T00:00:00+00:00")
    with pytest.raises(CheckpointError, match="Did you mean 'baseline'"):
        RunFolder.open(tmp_path, "baselin")


def test_a_home_that_is_a_file_is_refused_in_our_words(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot be made"):
        RunFolder.create(tmp_path, "first")


def test_runs_are_listed_by_age_and_strangers_are_not_runs(tmp_path: Path) -> None:
    make_run(tmp_path, "a-newer", "2026-02-01T00:00:00+00:00")
    make_run(tmp_path, "b-older", "2026-01-01T00:00:00+00:00")
    (tmp_path / "runs" / "notes").mkdir()
    (tmp_path / "runs" / "file.txt").write_text("")
    assert [run.name for run in list_runs(tmp_path)] == ["b-older", "a-newer"]
    assert list_runs(tmp_path / "nowhere") == []


def test_a_held_folder_cannot_be_held_twice_and_is_free_when_its_process_is_killed(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "first")
    program = (
        "import sys, time; from pathlib import Path; from fedllm.runs import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).held():\n    print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", program, str(folder.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert folder.is_held
        with pytest.raises(CheckpointError, match="another process"), folder.held():
            pass
        process.kill()
    assert not folder.is_held
    with folder.held():
        assert folder.is_held


EVENTS = [{"event": "round", "round": number, "name": "gr\u00fc\u00df\U0001f600" * number} for number in range(1, 5)]
LINES = [json.dumps(event, ensure_ascii=False).encode() + b"\n" for event in EVENTS]


@settings(deadline=None)
@given(cut=st.integers(0, sum(map(len, LINES))))
def test_metrics_cut_anywhere_give_exactly_the_events_that_are_whole(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    path.write_bytes(b"".join(LINES)[:cut])
    ends = [sum(map(len, LINES[: number + 1])) for number in range(len(LINES))]
    whole = sum(end - 1 <= cut for end in ends)  # a line is whole without its line's end too
    assert read_metrics(path) == EVENTS[:whole]


def test_metrics_that_are_missing_are_no_events(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("line", ["{not json", "[1]", '{"no": "kind"}', '{"event": 3}'])
def test_a_bad_line_in_the_middle_is_an_error_with_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"event": "end"}}\n{line}\n{{"event": "end"}}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:2"):
        read_metrics(path)


def test_a_manifest_comes_back_as_it_was_written(tmp_path: Path) -> None:
    counts = {"north": SiteCounts(train_examples=3, train_tokens=70)}
    config = RunConfig(num_rounds=7, seed=5)
    manifest = Manifest.of("run", config, base_fingerprint="ab", sites=counts, git_revision="c0ffee", num_parameters=9)
    manifest.write(tmp_path / "manifest.json")
    back = Manifest.read(tmp_path / "manifest.json")
    assert back == manifest
    assert back.run_config == config
    assert back.seeds == {"run": 5}


def test_a_manifest_of_a_later_release_can_be_read_though_its_config_may_not(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    Manifest.of("run", RunConfig()).write(path)
    document = json.loads(path.read_text()) | {"colour": "blue"}
    document["config"]["train.novelty"] = 1
    path.write_text(json.dumps(document))
    manifest = Manifest.read(path)
    assert manifest.name == "run"
    with pytest.raises(ConfigError, match=r"train\.novelty"):
        _ = manifest.run_config


def test_the_kind_of_a_setting_survives_the_manifest(tmp_path: Path) -> None:
    Manifest.of("run", RunConfig()).write(tmp_path / "manifest.json")
    config = Manifest.read(tmp_path / "manifest.json").config
    kinds = {key: type(config[key]) for key in ("deterministic", "num_rounds", "adapter.alpha", "name")}
    assert kinds == {"deterministic": bool, "num_rounds": int, "adapter.alpha": float, "name": str}


def test_a_manifest_that_is_none_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": 3}')
    with pytest.raises(CheckpointError, match="manifest"):
        Manifest.read(tmp_path / "manifest.json")
    with pytest.raises(CheckpointError, match="manifest"):
        Manifest.read(tmp_path / "none.json")


def test_a_write_that_fails_leaves_the_old_content_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    atomic_write(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_atomic_write_replaces_bytes_and_text_and_respects_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "file"
    before = os.umask(0o027)
    try:
        atomic_write(path, b"\x00\xff")
        assert path.read_bytes() == b"\x00\xff"
        atomic_write(path, "gr\u00fcn")
    finally:
        os.umask(before)
    assert path.read_bytes() == "gr\u00fcn".encode()
    assert path.stat().st_mode & 0o777 == 0o640


def test_releases_are_known_without_importing_what_they_are_of() -> None:
    program = (
        "import sys; from fedllm.runs import versions; found = versions()\n"
        "assert not {'torch', 'transformers', 'peft', 'flwr'} & set(sys.modules)\n"
        "print(found['fedllm'], found['flwr'])"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.split() == [versions()["fedllm"], versions()["flwr"]]


def test_a_revision_is_that_of_the_checkout_and_says_when_files_differ(tmp_path: Path) -> None:
    assert git_revision(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@x"]
    (tmp_path / "file").write_text("1")
    for arguments in (["init", "-q"], ["add", "file"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *arguments], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert git_revision(tmp_path) == commit
    (tmp_path / "file").write_text("2")
    assert git_revision(tmp_path) == f"{commit}+changes"
