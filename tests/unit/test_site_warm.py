"""The process that keeps libraries loaded: what it forks is a ClientApp of its own, and nothing depends on it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from client_app.service import warm
from tests.flower_process import wait_for

LIGHT_ONLY = (
    f"import sys; sys.path.append({str(Path(warm.__file__).parent)!r}); import warm; warm.HEAVY = (); warm._main()"
)


@pytest.fixture
def program(tmp_path: Path) -> Iterator[tuple[Path, psutil.Popen]]:
    """Run the warm process, without the libraries that take long, in a folder with a long name."""
    folder = tmp_path / ("a-name-as-long-as-no-socket-may-have-" * 4)
    folder.mkdir()
    bin_ = warm.write_program(folder)
    process = psutil.Popen([sys.executable, "-P", "-c", LIGHT_ONLY, str(folder)])
    wait_for((folder / "warm").exists)
    yield bin_ / warm.PROGRAM, process
    with suppress(psutil.NoSuchProcess):
        process.kill()
    process.wait()


def call(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60)


def test_a_message_gets_a_child_that_writes_where_its_caller_does(program: tuple[Path, psutil.Popen]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as runtime:
        runtime.settimeout(60)
        address = f"127.0.0.1:{runtime.getsockname()[1]}"
        command = [program[0], "--insecure", "--runtime-api-address", address, "--token", "t"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as caller:
            connection, _ = runtime.accept()
            with connection:
                [child] = program[1].children()
                assert connection.getpeername()[1] in {one.laddr.port for one in child.net_connections("tcp")}
                assert caller.wait(10) == 0, "who hands over need not wait"
                child.kill()
            assert "Start `flwr-clientapp` process" in caller.communicate()[1]
    wait_for(lambda: not program[1].children())
    assert "usage: flwr-clientapp" in call(program[0], "--help").stdout, "the next message is served as well"


def test_without_the_warm_process_flowers_own_program_runs(program: tuple[Path, psutil.Popen]) -> None:
    program[1].kill()
    program[1].wait()
    said = call(program[0], "--help")
    assert (said.returncode, said.stdout[:21]) == (0, "usage: flwr-clientapp")


def test_nonsense_is_said_and_harms_nobody(program: tuple[Path, psutil.Popen]) -> None:
    folder = program[0].parents[1]
    before = os.getcwd()
    os.chdir(folder)
    try:
        for nonsense in (b"", b"{\n", b"[]\n"):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect("warm")
                connection.sendall(nonsense)
                connection.shutdown(socket.SHUT_WR)
                assert connection.recv(1) == b""
    finally:
        os.chdir(before)
    assert "usage: flwr-clientapp" in call(program[0], "--help").stdout
    wait_for(lambda: not program[1].children())
