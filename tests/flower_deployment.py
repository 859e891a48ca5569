"""A deployed federation in real processes on loopback: a SuperLink and SuperNodes, without Ray.

Flower starts a process per ClientApp message here, as it does at institutions, so a site's process can be killed and the
next message gets a new one, which Flower's simulation cannot do.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

START_S = 120
ENVIRONMENT = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
}
FEDERATION = "on-loopback"


@dataclass(frozen=True)
class Deployment:
    """A running SuperLink and its SuperNodes.

    Attributes:
        folder: Flower's home, and where the server's runs lie.
        environment: Environment of all processes.
        link: The SuperLink's process.
        nodes: The SuperNodes' processes, in the order of their node configs.
    """

    folder: Path
    environment: Mapping[str, str]
    link: subprocess.Popen[bytes]
    nodes: Sequence[subprocess.Popen[bytes]]

    def start(self, app: Path, run_config: str) -> subprocess.Popen[str]:
        """Submit a run of an app and return at once; the process ends with the run."""
        command = [program("flwr"), "run", str(app), FEDERATION, "--stream", "--run-config", run_config]
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=dict(self.environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def client_apps(self, node: int) -> list[psutil.Process]:
        """Return the processes in which a SuperNode runs a ClientApp now."""
        with suppress(psutil.NoSuchProcess):
            below = psutil.Process(self.nodes[node].pid).children(recursive=True)
            return [child for child in below if "flwr-clientapp" in _command(child)]
        return []


def _command(process: psutil.Process) -> str:
    """Return a process's command, empty if it has just ended; a ClientApp of an earlier message may not be reaped yet."""
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


@contextmanager
def deployment(folder: Path, node_configs: Sequence[str], **variables: str) -> Iterator[Deployment]:
    """Run a SuperLink and a SuperNode per node config, and end them.

    Args:
        folder: An existing folder for Flower's files and the processes' log.
        node_configs: What each SuperNode gets as ``--node-config``, empty for nothing.
        **variables: More environment variables.
    """
    ports = _free_ports(1 + len(node_configs))
    environment = {**os.environ, **ENVIRONMENT, "FLWR_HOME": str(folder), **variables}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    address = f"127.0.0.1:{ports[0]}"
    (folder / "config.toml").write_text(f'[superlink.{FEDERATION}]\naddress="{address}"\ninsecure=true\n')
    link = [program("flower-superlink"), "--insecure", "--host", "127.0.0.1", "--port", str(ports[0])]
    node = [program("flower-supernode"), "--insecure", "--superlink", address, "--port"]
    commands = [link]
    for port, config in zip(ports[1:], node_configs, strict=True):
        commands += [[*node, str(port), *(["--node-config", config] if config else [])]]
    with (folder / "log").open("wb") as log:
        processes = [
            subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT) for command in commands
        ]
        try:
            _wait_for(ports[0])
            yield Deployment(folder, environment, processes[0], processes[1:])
        finally:
            _end(processes)


def program(name: str) -> str:
    """Return the path of a program of this environment."""
    return str(Path(sys.executable).with_name(name))


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    family = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            member = psutil.Process(process.pid)
            family += [member, *member.children(recursive=True)]
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=5)
    for member in alive:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    for process in processes:
        process.wait()


def _wait_for(port: int) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
            return
        time.sleep(0.1)
    raise RuntimeError(f"the SuperLink did not listen on port {port} within {START_S} s")


def _free_ports(number: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
