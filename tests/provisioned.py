"""A deployed federation as its people make it: `fedllm provision`, the server's scripts, a kit and a computer per site.

SuperLink and SuperExec run behind the gateway at one address, with TLS and node authentication; every site connects from
another address. Needs nginx.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from client_app.service.control import site_status
from client_app.service.status import Status
from fedllm.cli.main import main
from fedllm.runs import read_metrics
from tests.flower_deployment import _end
from tests.flower_process import REPOSITORY, staged_app, wait_for
from tests.free_ports import free_ports
from tests.networks import Computer, computers

NAME = "local-deployment"
SERVER = "server"
NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
SHORT_HEARTBEAT = """
import flwr.common.constant
flwr.common.constant.HEARTBEAT_DEFAULT_INTERVAL = flwr.common.constant.HEARTBEAT_MIN_INTERVAL
"""


@dataclass
class Provisioned:
    """A federation's folders, computers and processes.

    Attributes:
        folder: Where ``federation.toml`` lies, and ``runs/``.
        computers: By name of the site; the server's is ``server``.
        port: The public port.
        superlink_port: The SuperLink's, on the server's loopback.
        environment: Of all processes.
        processes: What was started here, by name.
    """

    folder: Path
    computers: Mapping[str, Computer]
    port: int
    superlink_port: int
    environment: Mapping[str, str]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def server(self) -> Path:
        """The operator's folder for the server."""
        return self.folder / NAME / "server"

    @property
    def address(self) -> str:
        """``host:port`` that sites connect to."""
        return f"{self.computers[SERVER].address}:{self.port}"

    def kit(self, site: str) -> Path:
        """Return the folder that a site unpacked its kit into."""
        return self.folder / "sites" / site

    def start(self, computer: str, name: str, *command: str | Path) -> subprocess.Popen[bytes]:
        """Start a program on a computer; its output goes into a log of its own."""
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [*self.computers[computer].prefix, *command],
                cwd=self.folder,
                env=dict(self.environment),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.processes[name] = process
        return process

    def start_superlink(self) -> subprocess.Popen[bytes]:
        """Start the SuperLink and wait until it listens."""
        process = self.start(SERVER, "superlink", self.server / "superlink.sh")
        self.wait_for_port(self.superlink_port)
        return process

    def wait_for_port(self, port: int) -> None:
        """Wait until something listens on a port of the server's loopback."""
        look = f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)"
        command = [*self.computers[SERVER].prefix, sys.executable, "-IS", "-c", look]
        wait_for(lambda: subprocess.run(command, capture_output=True).returncode == 0, poll_s=0.2)

    def start_site(self, site: str) -> subprocess.Popen[bytes]:
        """Start a site's service as a supervisor does."""
        command = (sys.executable, "-m", "fedllm.cli", "site", "start", "--foreground", "--quiet")
        return self.start(site, site, *command, self.kit(site))

    def status(self, site: str) -> Status:
        """Return what a site's service says of itself."""
        return site_status(self.kit(site))

    def service_log(self, site: str) -> str:
        """Return what a site's service wrote."""
        path = self.kit(site) / "service" / "log"
        return path.read_text() if path.exists() else ""

    def log(self, name: str) -> str:
        """Return what a program that was started here printed."""
        return (self.folder / f"{name}.log").read_text()

    def kill(self, name: str) -> None:
        """SIGKILL a program and all below it."""
        process = psutil.Process(self.processes[name].pid)
        for member in (*process.children(recursive=True), process):
            with suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGKILL)
        self.processes[name].wait()

    def submit(self, name: str, config: Mapping[str, object]) -> subprocess.Popen[bytes]:
        """Call `flwr run` on the server, as its README says, and return at once.

        Args:
            name: Names the log.
            config: The run config.
        """
        given = {"transport.advertise": self.address, "transport.insecure": True, **config}
        settings = " ".join(f"{key}={json.dumps(value)}" for key, value in given.items())
        home = f"FLWR_HOME={self.server / 'flwr'}"
        command = ("env", home, "flwr", "run", self.folder / "app", NAME, "--stream", "--run-config", settings)
        return self.start(SERVER, name, *command)

    def events(self, run: str) -> list[dict[str, object]]:
        """Return a run's events so far."""
        path = self.folder / "runs" / run / "metrics.jsonl"
        return list(read_metrics(path)) if path.exists() else []


@contextmanager
def provisioned(
    folder: Path, sites: Sequence[str], *, short_heartbeat: bool = True, **variables: str
) -> Iterator[Provisioned]:
    """Provision a federation, start its server, register its sites and unpack their kits; end everything.

    Args:
        folder: An empty folder.
        sites: Names of the sites, which are not started.
        short_heartbeat: Let the server take a killed SuperNode for connected for 20 s instead of 60.
        **variables: More environment variables.
    """
    with ExitStack() as ending:
        places = ending.enter_context(computers([SERVER, *sites]))
        superlink, public = free_ports(2)
        federation = Provisioned(folder, places, public, superlink, _environment(folder, short_heartbeat, variables))
        _provision(federation, sites)
        ending.callback(lambda: _end(list(federation.processes.values())))
        federation.start_superlink()
        federation.start(SERVER, "superexec", federation.server / "superexec.sh")
        federation.start(SERVER, "gateway", federation.server / "gateway.sh")
        federation.wait_for_port(public)
        federation.start(SERVER, "register", federation.server / "register.sh").wait()
        yield federation


def _environment(folder: Path, short_heartbeat: bool, variables: Mapping[str, str]) -> dict[str, str]:
    (folder / "python").mkdir()
    if short_heartbeat:
        (folder / "python" / "sitecustomize.py").write_text(SHORT_HEARTBEAT)
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("FLWR_")}
    return {
        **inherited,
        "PATH": f"{Path(sys.executable).parent}:{inherited['PATH']}:/usr/sbin",
        "PYTHONPATH": f"{folder / 'python'}:{REPOSITORY}",
        "FEDLLM_HOME": str(folder),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        **variables,
    }


def _provision(federation: Provisioned, sites: Sequence[str]) -> None:
    folder = federation.folder
    make_kits(folder, federation, sites)
    nginx = federation.server / "nginx.conf"
    text = nginx.read_text().replace("/tmp/fedllm-gateway", str(folder / "gateway"))
    nginx.write_text(text.replace("/dev/stdout", str(folder / "access.log")))
    for site in sites:
        shutil.unpack_archive(folder / NAME / "kits" / f"{site}.tar.gz", folder / "sites", filter="data")
    staged_app(folder)


def make_kits(folder: Path, federation: Provisioned, sites: Sequence[str]) -> None:
    """Write ``federation.toml`` into a folder and have kits made from it."""
    server = f'host = "{federation.computers[SERVER].address}"\nport = {federation.port}\n'
    text = f'[federation]\nname = "{NAME}"\n[server]\n{server}superlink_port = {federation.superlink_port}\n'
    (folder / "federation.toml").write_text(text + "".join(f'[[sites]]\nname = "{site}"\n' for site in sites))
    with redirect_stdout(sys.stderr):
        assert main(["provision", str(folder / "federation.toml")]) == 0
