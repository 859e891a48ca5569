"""Where runs are kept, against real processes that look like ``flwr run`` to the operating system."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedllm import home
from fedllm.home import calling_app, default_cache_dir, resolve_home, shell_home


@pytest.fixture
def flower_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Flower home of this test's own, by which its callers are told from others on this machine."""
    folder = tmp_path / "flower"
    (folder / "apps" / "copy").mkdir(parents=True)
    monkeypatch.setenv("FLWR_HOME", str(folder))
    monkeypatch.delenv("FEDLLM_HOME", raising=False)
    return folder


@pytest.fixture
def app(tmp_path: Path) -> Path:
    return make_app(tmp_path / "app", "fedllm")


def make_app(folder: Path, name: str) -> Path:
    folder.mkdir()
    (folder / "pyproject.toml").write_text(f'[project]\nname = "{name}"\nversion = "1"\n')
    return folder


@contextmanager
def flwr_run(app: Path | str, folder: Path, **environment: str) -> Iterator[None]:
    """Run a program named ``flwr`` with Flower's arguments in a folder."""
    program = folder / "bin" / "flwr"
    program.parent.mkdir(parents=True)
    program.write_text("import time\nprint('up', flush=True)\ntime.sleep(60)\n")
    command = [sys.executable, str(program), "run", str(app), "--stream"]
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        yield
        process.kill()


def test_runs_lie_where_flwr_run_was_called_not_where_the_server_runs(
    tmp_path: Path, flower_home: Path, app: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(flower_home)
    caller = tmp_path / "caller"
    with flwr_run("../app", caller, FLWR_HOME=str(flower_home)):
        assert resolve_home() == caller
        assert resolve_home("sub/folder") == caller / "sub" / "folder"
        assert resolve_home("/elsewhere") == Path("/elsewhere")
        assert calling_app() == app


def test_the_caller_s_own_variable_counts_though_the_server_does_not_inherit_it(
    tmp_path: Path, flower_home: Path, app: Path
) -> None:
    with flwr_run(app, tmp_path / "caller", FLWR_HOME=str(flower_home), FEDLLM_HOME=str(tmp_path / "chosen")):
        assert resolve_home() == tmp_path / "chosen"
        assert resolve_home("mine") == tmp_path / "caller" / "mine"


def test_the_youngest_of_several_callers_counts(tmp_path: Path, flower_home: Path, app: Path) -> None:
    with flwr_run(app, tmp_path / "older", FLWR_HOME=str(flower_home)):
        time.sleep(0.05)  # process start times have a resolution of 10 ms
        with flwr_run(app, tmp_path / "younger", FLWR_HOME=str(flower_home)):
            assert resolve_home() == tmp_path / "younger"


def test_a_younger_caller_of_another_app_or_of_another_superlink_does_not_count(
    tmp_path: Path, flower_home: Path, app: Path
) -> None:
    other = make_app(tmp_path / "other", "weather-forecast")
    with flwr_run(app, tmp_path / "ours", FLWR_HOME=str(flower_home)):
        time.sleep(0.05)
        theirs, foreign = tmp_path / "theirs", tmp_path / "foreign"
        with flwr_run(other, theirs, FLWR_HOME=str(flower_home)), flwr_run(app, foreign, FLWR_HOME="/x"):
            assert resolve_home() == tmp_path / "ours"


def test_without_a_caller_runs_lie_in_the_own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDLLM_HOME", raising=False)
    monkeypatch.setattr(home, "_flwr_runs", lambda: iter(()))  # others on this machine may be calling
    monkeypatch.chdir(tmp_path)
    assert resolve_home() == tmp_path
    assert resolve_home("sub") == tmp_path / "sub"
    assert calling_app() is None
    monkeypatch.setenv("FEDLLM_HOME", "/var/fedllm")
    assert resolve_home() == Path("/var/fedllm")


def test_runs_are_never_put_into_flower_s_copy_of_an_app(flower_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(home, "_flwr_runs", lambda: iter(()))
    monkeypatch.chdir(flower_home / "apps" / "copy")
    assert resolve_home() == Path.home()


def test_a_directory_removed_under_the_server_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDLLM_HOME", raising=False)
    monkeypatch.setattr(home, "_flwr_runs", lambda: iter(()))
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert resolve_home() == Path.home()


def test_a_person_s_shell_counts_the_value_then_the_variable_then_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDLLM_HOME", raising=False)
    assert shell_home() == tmp_path
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / "set"))
    assert shell_home() == tmp_path / "set"
    assert shell_home("given") == tmp_path / "given"


def test_the_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("FEDLLM_CACHE")
    assert default_cache_dir() == Path.home() / ".cache" / "fedllm"
