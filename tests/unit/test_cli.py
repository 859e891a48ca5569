import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from fedllm.cli.config import as_markdown, as_toml, run_settings
from fedllm.cli.main import COMMANDS, main
from fedllm.config import RunConfig, describe, read_run_config
from fedllm.errors import CheckpointError
from fedllm.runs import RunFolder
from tests.sample_runs import write_sample

ROOT = Path(__file__).parents[2]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def fedllm(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process and return status, output and errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_runs_are_listed_with_status_and_losses(fedllm: Run, tmp_path: Path) -> None:
    write_sample(tmp_path, "good")
    write_sample(tmp_path, "bad", num_rounds=2, status="failed", reason="why")
    write_sample(tmp_path, "cut", num_rounds=0, status="")
    status, output, _ = fedllm("runs", "--home", tmp_path)
    rows = {line.split()[0]: line.split()[1:] for line in output.splitlines()[1:]}
    assert status == 0
    assert rows["good"] == ["finished", "6/6", "3.578", "2.894", "6", "2026-09-21", "14:13"]
    assert rows["bad"][:2] == ["failed", "2/6"]
    assert rows["cut"][:5] == ["interrupted", "0/6", "3.578", "-", "-"]


def test_runs_as_json_hold_the_same_for_programs(fedllm: Run, tmp_path: Path) -> None:
    folder = write_sample(tmp_path, "good")
    (row,) = json.loads(fedllm("runs", "--json", "--home", tmp_path)[1])
    assert (row["name"], row["status"], row["rounds"], row["num_rounds"]) == ("good", "finished", 6, 6)
    assert (row["best_round"], row["path"]) == (6, str(folder.path))
    assert 2.8 < row["best_loss"] < 2.9 < row["base_loss"]
    assert json.loads(fedllm("runs", "--json", "--home", tmp_path / "none")[1]) == []


def test_a_run_that_a_process_holds_is_running(fedllm: Run, tmp_path: Path) -> None:
    folder = write_sample(tmp_path, "busy", num_rounds=1, status="")
    with folder.held():
        assert "running" in fedllm("runs", "--home", tmp_path)[1]
    assert "interrupted" in fedllm("runs", "--home", tmp_path)[1]


def test_a_run_with_unreadable_files_does_not_hide_the_others(fedllm: Run, tmp_path: Path) -> None:
    write_sample(tmp_path, "good")
    broken = write_sample(tmp_path, "broken")
    broken.metrics.write_text("nonsense\n{}\n")
    broken.manifest.write_text("nonsense")
    status, output, _ = fedllm("runs", "--home", tmp_path)
    assert status == 0
    assert "unreadable" in output
    assert "finished" in output


@pytest.mark.parametrize("how", ["name", "path", "newest"])
def test_a_report_is_made_for_a_run_by_name_by_path_or_the_newest(fedllm: Run, tmp_path: Path, how: str) -> None:
    folder = write_sample(tmp_path, "good")
    arguments = {"name": ["good", "--home", tmp_path], "path": [folder.path], "newest": ["--home", tmp_path]}[how]
    status, output, _ = fedllm("report", "--open-path", *arguments)
    assert (status, output) == (0, f"{folder.report}\n")
    assert folder.report.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["report", "goot"], "Did you mean 'good'?"),
        (["report", "/nowhere/at/all"], "not a run's folder"),
        (["report", "bad name"], "cannot be used"),
        (["generate", "--run", "good", "--prompt", "x"], "no such adapter"),
        (["generate", "--run", "good", "--best"], "no such adapter"),
        (["generate", "--run", "good", "--prompt", "x", "--max-new-tokens", "0"], "1 or more"),
    ],
)
def test_an_error_of_ours_is_one_line_and_status_2(
    fedllm: Run, tmp_path: Path, arguments: list[str], words: str
) -> None:
    write_sample(tmp_path, "good")
    status, output, errors = fedllm(*arguments, "--home", tmp_path)
    assert (status, output) == (2, "")
    assert errors.startswith(f"fedllm {arguments[0]}: ")
    assert errors.count("\n") == 1
    assert words in errors


def test_without_any_run_the_error_says_where_it_looked(fedllm: Run, tmp_path: Path) -> None:
    status, _, errors = fedllm("report", "--home", tmp_path)
    assert status == 2
    assert str(tmp_path / "runs") in errors
    assert fedllm("runs", "--home", tmp_path)[:2] == (0, f"no runs in {tmp_path / 'runs'}\n")


def test_debug_shows_where_an_error_came_from(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        main(["report", "none", "--debug", "--home", str(tmp_path)])


def test_the_version_names_fedllm_and_flower(fedllm: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        fedllm("--version")
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith("fedllm 0.")


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = f"{sys.executable} -m fedllm.cli config --json | head -c 10"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_command_starts_without_torch_flower_or_numpy() -> None:
    program = (
        "import sys; from fedllm.cli.main import main\nmain(['config'])\n"
        "assert not {'torch', 'flwr', 'numpy', 'transformers'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=os.environ)
    assert done.returncode == 0, done.stderr


def test_every_command_has_a_help_and_no_two_have_one_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert len({command.name for command in COMMANDS}) == len(COMMANDS)
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([command.name, "--help"])
        assert command.summary.split()[0] in capsys.readouterr().out.lower()


def test_the_settings_are_those_of_the_run_config_with_default_values_and_meaning(fedllm: Run) -> None:
    rows = json.loads(fedllm("config", "--json")[1])
    assert [row["key"] for row in rows] == [key for key, _, _ in describe(RunConfig)]
    by_key = {row["key"]: row for row in rows}
    assert by_key["rounds.deadline_s"]["unit"] == "seconds"
    assert by_key["adapter.rank"]["allowed"] == "whole number \u2265 1 and \u2264 1024"
    assert by_key["model.quantization"]["allowed"] == "none, int8, nf4"
    assert all(row["meaning"] and row["allowed"] for row in rows)


def test_the_text_fits_the_terminal(fedllm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    lines = fedllm("config")[1].splitlines()
    explanations = [line for line in lines if line.startswith(" ")]
    assert max(map(len, explanations)) <= 90
    assert len([line for line in lines if not line.startswith(" ")]) == len(run_settings())


def test_the_generated_table_is_what_flower_reads_and_gives_the_defaults() -> None:
    table = tomllib.loads(as_toml())["tool"]["flwr"]["app"]["config"]
    assert read_run_config(flat(table)) == RunConfig()
    assert set(flat(table)) == {setting.key for setting in run_settings()}


def test_pyproject_holds_the_generated_defaults() -> None:
    app = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    if "config" not in app:
        pytest.skip("pyproject.toml has no [tool.flwr.app.config] yet: `fedllm config --format toml` prints it")
    generated = tomllib.loads(as_toml())["tool"]["flwr"]["app"]["config"]
    assert flat(app["config"]) == flat(generated), "put the output of `fedllm config --format toml` into pyproject.toml"


def test_the_configuration_page_is_the_generated_one() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == as_markdown(), "run `fedllm config --format markdown > docs/configuration.md`"


def flat(table: dict[str, object], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Flatten nested tables as Flower does."""
    found: dict[str, str | int | float | bool] = {}
    for key, value in table.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}  # type: ignore[dict-item]
    return found


def test_a_folder_named_on_the_command_line_needs_no_home(
    fedllm: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_sample(tmp_path, "good")
    monkeypatch.chdir(tmp_path)
    assert fedllm("report", "runs/good", "--open-path")[1] == f"{folder.report}\n"
    assert RunFolder.open(tmp_path, "good") == folder
