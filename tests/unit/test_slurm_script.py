"""The Slurm job of a site's kit, run by bash as Slurm would run it, with a real service in it and a server that is away."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from client_app.service.control import site_status
from fedllm.cli.main import main
from tests.free_ports import free_port

SCRIPTS = Path(__file__).parents[2] / "deploy"


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slurm")
    port = free_port()
    (folder / "federation.toml").write_text(
        f'[federation]\nname = "study"\n[server]\nhost = "127.0.0.1"\nport = {port}\n[[sites]]\nname = "a"\n'
    )
    assert main(["provision", str(folder / "federation.toml")]) == 0
    return folder / "study" / "kits" / "a"


@pytest.fixture
def job(kit: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the job; ``scontrol`` on its path writes down what it is asked."""
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/asked\nexit ${{SCONTROL_STATUS:-0}}\n')
    (tmp_path / "scontrol").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    given = {"PATH": path, "SLURM_SUBMIT_DIR": str(kit), "SLURM_JOB_ID": "4711", "SLURM_RESTART_COUNT": "2"}
    given["PYTHONPATH"] = str(SCRIPTS.parent)
    started: list[subprocess.Popen[str]] = []

    def start(**more: str) -> subprocess.Popen[str]:
        command = ["bash", str(kit / "fedllm-site.sbatch")]
        environment = os.environ | given | more
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, env=environment, cwd=tmp_path, **pipes))  # type: ignore[call-overload]
        return started[-1]

    yield start
    main(["site", "stop", str(kit)])
    for process in started:
        process.kill()
        process.communicate()


def begun(kit: Path) -> list[psutil.Process]:
    """Wait until the site's SuperNode runs, and return all processes of its service."""
    end = time.monotonic() + 240
    while time.monotonic() < end:
        time.sleep(0.1)
        if pid := site_status(kit).pid:
            service = psutil.Process(pid)
            family = service.children(recursive=True)
            with suppress(psutil.NoSuchProcess):
                if any("flower-supernode" in " ".join(each.cmdline()) for each in family):
                    return [service, *family]
    raise AssertionError(site_status(kit))


def asked(folder: Path) -> list[str]:
    return (folder / "asked").read_text().splitlines() if (folder / "asked").exists() else []


def test_told_that_its_time_ends_it_ends_the_site_and_is_queued_again(
    kit: Path, job: Callable[..., subprocess.Popen[str]], tmp_path: Path
):
    process = job()
    family = begun(kit)
    process.send_signal(signal.SIGUSR1)
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 0, said
    assert asked(tmp_path) == ["requeue 4711"]
    assert "start 3 of job 4711" in said
    assert "[service] ends" in said
    assert not psutil.wait_procs(family, timeout=60)[1]
    assert site_status(kit).sentence() == "not running"


def test_cancelled_it_ends_the_site_and_stays_away(
    kit: Path, job: Callable[..., subprocess.Popen[str]], tmp_path: Path
):
    process = job()
    family = begun(kit)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=240)[0]
    assert (process.returncode, asked(tmp_path)) == (0, []), said
    assert not psutil.wait_procs(family, timeout=60)[1]


def test_what_cannot_run_is_not_queued_again(kit: Path, job: Callable[..., subprocess.Popen[str]], tmp_path: Path):
    site = kit / "site.toml"
    text = site.read_text()
    site.write_text(text.replace("[data]", "[dta]"))
    try:
        process = job()
        said = process.communicate(timeout=240)[0]
    finally:
        site.write_text(text)
    assert process.returncode == 2, said
    assert "dta" in said
    assert asked(tmp_path) == []


def test_a_job_that_slurm_does_not_queue_again_has_failed(
    kit: Path, job: Callable[..., subprocess.Popen[str]], tmp_path: Path
):
    process = job(SCONTROL_STATUS="1")
    begun(kit)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=240)
    assert (process.returncode, asked(tmp_path)) == (1, ["requeue 4711"])


def test_it_runs_only_where_slurm_says_where_it_is(job: Callable[..., subprocess.Popen[str]], tmp_path: Path):
    process = job(SLURM_SUBMIT_DIR="")
    assert "from the folder of the kit" in process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert asked(tmp_path) == []


def test_the_job_asks_for_what_it_needs(kit: Path):
    lines = (kit / "fedllm-site.sbatch").read_text().splitlines()
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if line.startswith("#SBATCH"))
    assert options["gres"] == "gpu:1"
    assert options["signal"] == "B:USR1@120", "to the script alone, which ends the service in order"
    assert "requeue" in options
    assert options["open-mode"] == "append", "one log for all starts of a job"
    assert options["dependency"] == "singleton", "the server takes one SuperNode with the site's key"
    assert lines[0] == "#!/bin/bash"


@pytest.mark.parametrize(
    "script", sorted(SCRIPTS.rglob("*.sh")) + sorted(SCRIPTS.rglob("*.sbatch")), ids=lambda path: path.name
)
def test_every_script_that_we_ship_is_sound(script: Path):
    shell = script.read_text().splitlines()[0].split("/")[-1].split()[-1]
    subprocess.run([shell, "-n", script], check=True)
    if shutil.which("shellcheck"):
        checked = subprocess.run(["shellcheck", script], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout
