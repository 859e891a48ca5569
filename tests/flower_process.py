"""Real Flower processes for tests: a local SuperLink of its own, `flwr run` in the foreground, and the means to kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.free_ports import free_port

REPOSITORY = Path(__file__).parents[1]
NOT_THE_APP = shutil.ignore_patterns("__pycache__")
TOO_SLOW = (
    "The current node timed out during startup",  # Ray
    "Failed to start local SuperLink within",
    "Connection to the SuperLink is unavailable",
)
"""What is said where a busy machine let the time pass that a start may take; it cannot be given more."""

ATTEMPTS = 3
RAY_LOGS = Path("/tmp/ray")
SHOW_STACKS = "import faulthandler, signal; faulthandler.register(signal.SIGUSR1)"


@dataclass(frozen=True)
class Flower:
    """One Flower home with its own local SuperLink.

    Attributes:
        folder: Where `flwr run` is called and `runs/` appears.
        app: A copy of the app, see :func:`staged_app`.
        environment: Environment of all processes.
        port: The SuperLink's port.
    """

    folder: Path
    app: Path
    environment: Mapping[str, str]
    port: int

    def start(self, config: Mapping[str, object], num_sites: int, *, cpus_per_site: int = 2) -> subprocess.Popen[str]:
        """Call `flwr run --stream` and return at once."""
        settings = " ".join(f"{key}={_toml(value)}" for key, value in config.items())
        command = [
            str(Path(sys.executable).with_name("flwr")),
            "run",
            str(self.app),
            "--stream",
            "--run-config",
            settings,
            "--federation-config",
            f"num-supernodes={num_sites} client-resources-num-cpus={cpus_per_site} init-args-num-cpus=2",
        ]
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=dict(self.environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(
        self, config: Mapping[str, object], num_sites: int, timeout_s: float = 540, *, cpus_per_site: int = 2
    ) -> str:
        """Call `flwr run --stream`, wait for its end, and return what it printed; again where a start took too long."""
        for _ in range(ATTEMPTS - 1):
            output = self._run_once(config, num_sites, timeout_s, cpus_per_site)
            if not any(words in output for words in TOO_SLOW):
                return output
            self._forget(config)
        return self._run_once(config, num_sites, timeout_s, cpus_per_site)

    def _run_once(self, config: Mapping[str, object], num_sites: int, timeout_s: float, cpus_per_site: int) -> str:
        process = self.start(config, num_sites, cpus_per_site=cpus_per_site)
        try:
            return process.communicate(timeout=timeout_s)[0]
        except subprocess.TimeoutExpired:
            stacks = self._stacks()
            process.kill()
            output = process.communicate()[0]
            raise AssertionError(f"flwr run took over {timeout_s} s:\n{output}\n{stacks}") from None

    def start_until(
        self,
        config: Mapping[str, object],
        num_sites: int,
        condition: Callable[[], object],
        timeout_s: float = 300,
        poll_s: float = 0.02,
    ) -> subprocess.Popen[str]:
        """Call `flwr run --stream` and return once a condition holds; start again where a start took too long.

        Raises:
            AssertionError: The run ended before, or it takes too long; with what it printed and where Ray's workers are.
        """
        for _ in range(ATTEMPTS):
            process = self.start(config, num_sites)
            if wait_while_running(process, condition, timeout_s, poll_s, more=self._stacks):
                return process
            output = process.communicate()[0]
            assert any(words in output for words in TOO_SLOW), (
                f"the run ended before it was to be waited for:\n{output}"
            )
            self._forget(config)
        raise AssertionError(f"{ATTEMPTS} starts took too long; the last:\n{output}")

    def _forget(self, config: Mapping[str, object]) -> None:
        """Remove what a run left that came to nothing."""
        if "resume" not in config:
            shutil.rmtree(self.folder / "runs" / str(config["name"]), ignore_errors=True)

    def server_processes(self) -> list[psutil.Process]:
        """Return the processes that run a ServerApp (in simulation: and Ray's driver) under this home's SuperLink."""
        return [process for process in self._descendants() if "flwr-simulation" in " ".join(_command(process))]

    def server_family(self) -> list[psutil.Process]:
        """Return the server's processes, and behind them what Ray runs for them."""
        servers = self.server_processes()
        assert servers, "no server process is running"
        return [*servers, *(child for server in servers for child in server.children(recursive=True))]

    def kill_server(self, family: list[psutil.Process] | None = None) -> None:
        """SIGKILL the server's process, and then what Ray leaves behind of it.

        Args:
            family: What :meth:`server_family` returned before, since looking for it takes a tenth of a second.
        """
        for process in family or self.server_family():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)

    def events(self, name: str) -> list[dict[str, object]]:
        """Return a run's events so far."""
        path = self.folder / "runs" / name / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def stop(self) -> None:
        """End the SuperLink and everything under it."""
        processes = self._descendants()
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        _, alive = psutil.wait_procs(processes, timeout=5)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def _stacks(self) -> str:
        """Return where the threads of Ray's workers are, and what the SuperLink wrote at last."""
        workers = [process for process in self._descendants() if "ray::" in " ".join(_command(process))]
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.send_signal(signal.SIGUSR1)
        time.sleep(2)
        logs = [log for worker in workers for log in RAY_LOGS.glob(f"session_2*/logs/worker-*-{worker.pid}.err")]
        logs += self.folder.glob("flwr-home/local-superlink/*.log")
        return "\n".join(f"{log.name}:\n{log.read_text(errors='replace')[-20_000:]}" for log in logs)

    def _descendants(self) -> list[psutil.Process]:
        links = [process for process in psutil.process_iter() if self._is_superlink(process)]
        return [process for link in links for process in [link, *link.children(recursive=True)]]

    def _is_superlink(self, process: psutil.Process) -> bool:
        command = _command(process)
        return any("flower-superlink" in part for part in command) and str(self.port) in command


@contextmanager
def flower(folder: Path, **variables: str) -> Iterator[Flower]:
    """Yield a Flower home in an empty folder; everything that was started under it ends with it."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("FLWR_", "FEDLLM_HOME"))},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(folder / "flwr-home"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
        "RAY_worker_niceness": "0",  # at Ray's own 15 the other tests leave a site nearly nothing
        "PYTHONPATH": str(folder / "stacks"),
        **variables,
    }
    (folder / "stacks").mkdir(exist_ok=True)
    (folder / "stacks" / "sitecustomize.py").write_text(SHOW_STACKS)
    home = Flower(folder, staged_app(folder), environment, port)
    try:
        yield home
    finally:
        home.stop()


def staged_app(folder: Path) -> Path:
    """Copy what `flwr run` packs into `folder/app` and return that path.

    Flower looks at every file under an app's folder, and a virtual environment in the repository has tens of thousands.
    """
    app = folder / "app"
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    for pattern in settings["fab-include"]:
        root = REPOSITORY / pattern.split("/")[0]
        if root.is_dir():
            shutil.copytree(root, app / root.name, ignore=NOT_THE_APP)
        else:
            shutil.copy(root, app)
    shutil.copy(REPOSITORY / "pyproject.toml", app)
    return app


def wait_for(condition: Callable[[], object], timeout_s: float = 300, poll_s: float = 0.02) -> None:
    """Wait until a function returns something true."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"waited more than {timeout_s} s"
        time.sleep(poll_s)


def wait_while_running(
    process: subprocess.Popen[str],
    condition: Callable[[], object],
    timeout_s: float = 300,
    poll_s: float = 0.02,
    *,
    more: Callable[[], str] = str,
) -> bool:
    """Wait until a condition holds or a process has ended, and return whether the condition holds.

    Raises:
        AssertionError: Neither came about in time. The process is killed; what it printed is told, and what `more` returns.
    """
    try:
        wait_for(lambda: condition() or process.poll() is not None, timeout_s, poll_s)
    except AssertionError as error:
        told = more()
        process.kill()
        raise AssertionError(f"{error}:\n{process.communicate()[0]}\n{told}") from None
    return bool(condition())


def _toml(value: object) -> str:
    return json.dumps(value)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
