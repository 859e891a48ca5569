"""The lock of a site's service, and what others learn from it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from client_app.service.control import site_status, stop_site
from client_app.service.folder import ServiceFolder
from client_app.service.status import Status, write_status
from fedllm.cli.main import main
from fedllm.errors import ConfigError, TransportError

HOLD = """
import pathlib, sys, time
from client_app.service.folder import ServiceFolder
with ServiceFolder(pathlib.Path(sys.argv[1])).held():
    print("held", flush=True)
    time.sleep(60)
"""


def _holder(kit: Path, program: str = HOLD) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", program, str(kit)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    process.stdout.close()
    return process


def test_a_held_kit_is_running_and_cannot_be_held_twice(tmp_path: Path):
    folder = ServiceFolder(tmp_path)
    assert folder.holder() is None
    with folder.held():
        assert folder.holder() == os.getpid()
        write_status(folder.status, Status(phase="connected", node_id="7", started="2026-01-02T03:04:05+00:00"))
        assert "connected as node 7" in site_status(tmp_path).sentence()
        with pytest.raises(ConfigError, match="already served"), folder.held():
            pass
    assert folder.holder() is None
    assert site_status(tmp_path).sentence() == "not running"
    assert folder.path.stat().st_mode & 0o777 == 0o700


def test_a_killed_service_is_not_taken_for_a_running_one(tmp_path: Path):
    process = _holder(tmp_path)
    assert site_status(tmp_path).pid == process.pid
    process.kill()
    process.wait()
    assert site_status(tmp_path).sentence() == "not running"
    assert stop_site(tmp_path) is False


def test_stop_ends_the_holder_and_waits_for_it(tmp_path: Path):
    process = _holder(tmp_path)
    assert stop_site(tmp_path) is True
    assert process.wait(timeout=60) == -signal.SIGTERM


def test_a_service_that_does_not_end_is_named(tmp_path: Path):
    process = _holder(tmp_path, "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + HOLD)
    try:
        with pytest.raises(TransportError, match=rf"did not end.*kill -9 {process.pid}"):
            stop_site(tmp_path, timeout_s=0.3)
    finally:
        process.kill()
        process.wait()


def test_the_command_says_whether_a_site_runs_by_its_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["site", "status", str(tmp_path)]) == 1
    with ServiceFolder(tmp_path).held():
        assert main(["site", "status", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "not running"
