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

from client_app.service.warm import warm_command, write_program
from tests.free_ports import free_ports

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
        warm: The processes that become their ClientApps, one for each SuperNode where they are kept.
    """

    folder: Path
    environment: Mapping[str, str]
    link: subprocess.Popen[bytes]
    nodes: Sequence[subprocess.Popen[bytes]]
    warm: Sequence[subprocess.Popen[bytes]]

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
            if self.warm:
                return psutil.Process(self.warm[node].pid).children()
            below = psutil.Process(self.nodes[node].pid).children(recursive=True)
            return [child for child in below if "flwr-clientapp" in _command(child)]
        return []


def _command(process: psutil.Process) -> str:
    """Return a process's command, empty if it has just ended; a ClientApp of an earlier message may not be reaped yet."""
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


@contextmanager
def deployment(
    folder: Path, node_configs: Sequence[str], *, is_warm: bool = False, **variables: str
) -> Iterator[Deployment]:
    """Run a SuperLink and a SuperNode per node config, and end them.

    Args:
        folder: An existing folder for Flower's files and the processes' log.
        node_configs: What each SuperNode gets as ``--node-config``, empty for nothing.
        is_warm: Whether libraries are loaded once for each node, as a site's service does, and not for every message.
        **variables: More environment variables.
    """
    ports = free_ports(1 + len(node_configs))
    environment = {**os.environ, **ENVIRONMENT, "FLWR_HOME": str(folder), **variables}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    address = f"127.0.0.1:{ports[0]}"
    (folder / "config.toml").write_text(f'[superlink.{FEDERATION}]\naddress="{address}"\ninsecure=true\n')
    link = [program("flower-superlink"), "--insecure", "--host", "127.0.0.1", "--port", str(ports[0])]
    node = [program("flower-supernode"), "--insecure", "--superlink", address, "--port"]
    with (folder / "log").open("wb") as log:
        processes: list[subprocess.Popen[bytes]] = []

        def start(command: list[str], **changes: str) -> subprocess.Popen[bytes]:
            process = subprocess.Popen(command, env={**environment, **changes}, stdout=log, stderr=subprocess.STDOUT)
            processes.append(process)
            return process

        try:
            superlink, nodes, warm = start(link), [], []
            for index, (port, config) in enumerate(zip(ports[1:], node_configs, strict=True)):
                path = environment["PATH"]
                if is_warm:
                    kept = folder / f"node-{index}"
                    kept.mkdir()
                    path = f"{write_program(kept)}{os.pathsep}{path}"
                    warm.append(start(warm_command(kept)))
                nodes.append(start([*node, str(port), *(["--node-config", config] if config else [])], PATH=path))
            _wait_for(ports[0])
            yield Deployment(folder, environment, superlink, nodes, warm)
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
