"""Rounds of Flower's own transport between real processes: a SuperLink, SuperNodes, a ServerApp, ClientApps."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

APP = Path(__file__).with_name("flower-app")
ENVIRONMENT = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
}
START_S = 120


def flower_rounds(megabytes: int, num_arrays: int, num_clients: int, num_rounds: int) -> list[float]:
    """Return the seconds of each round, the first of a warm-up left out.

    Args:
        megabytes: float32 bytes that travel each way to and from each client, in MB.
        num_arrays: In how many arrays; 0 sends next to nothing, which shows what a round costs in itself.
        num_clients: SuperNodes.
        num_rounds: Rounds to count.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = folder / "seconds.json"
        config = (
            f'megabytes={megabytes} arrays={num_arrays} clients={num_clients} rounds={num_rounds + 1} output="{result}"'
        )
        with _deployment(folder, num_clients) as environment:
            done = subprocess.run(
                [_program("flwr"), "run", str(APP), "benchmark", "--stream", "--run-config", config],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
        if not result.exists():
            raise RuntimeError(f"the Flower app did not finish:\n{done.stdout}\n{done.stderr}")
        return [float(seconds) for seconds in json.loads(result.read_text())[1:]]


@contextmanager
def _deployment(folder: Path, num_clients: int) -> Iterator[dict[str, str]]:
    """Run a SuperLink and SuperNodes; yield the environment in which `flwr run` finds them."""
    ports = _free_ports(1 + num_clients)
    environment = {**os.environ, **ENVIRONMENT, "FLWR_HOME": str(folder)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    link = f"127.0.0.1:{ports[0]}"
    (folder / "config.toml").write_text(
        f'[superlink]\ndefault="benchmark"\n[superlink.benchmark]\naddress="{link}"\ninsecure=true\n'
    )
    node = [_program("flower-supernode"), "--insecure", "--superlink", link, "--port"]
    commands = [
        [_program("flower-superlink"), "--insecure", "--host", "127.0.0.1", "--port", str(ports[0])],
        *([*node, str(port)] for port in ports[1:]),
    ]
    with (folder / "log").open("w") as log:
        processes = [
            subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            for command in commands
        ]
        try:
            _wait_for(ports[0])
            yield environment
        finally:
            for process in processes:
                os.killpg(process.pid, signal.SIGTERM)
            for process in processes:
                process.wait()


def _wait_for(port: int) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
            return
        time.sleep(0.1)
    raise RuntimeError(f"the SuperLink did not listen on port {port} within {START_S} s")


def _program(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def _free_ports(number: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
