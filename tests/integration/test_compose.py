"""The federation of containers, really built and run: isolation, a killed site, a site cut off its network.

Needs a Docker engine and the images (`make images`); without a registry, `deploy/images/local-base.sh` makes their bases.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flower_process import REPOSITORY, wait_while_running

PROJECT = "fedllm-test"
DEMO = ["bash", str(REPOSITORY / "deploy" / "compose" / "demo.sh")]
BIN = str(Path(sys.executable).parent)
CUT_S = 20

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

CONNECT = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), 3).close()
except OSError as error:
    sys.exit(f"refused: {error}")
"""
ASK = """
import ssl, sys, urllib.request, urllib.error
context = ssl.create_default_context(cafile="/kit/ca.crt")
try:
    request = urllib.request.Request("https://gateway:8443" + sys.argv[1], data=b"" if sys.argv[2] == "POST" else None)
    print(urllib.request.urlopen(request, timeout=5, context=context).status)
except urllib.error.HTTPError as error:
    print(error.code)
"""


def docker(*arguments: str) -> str:
    return subprocess.run(["docker", *arguments], check=True, capture_output=True, text=True).stdout.strip()


def has_images() -> bool:
    try:
        return bool(docker("image", "ls", "-q", "fedllm-server")) and bool(docker("image", "ls", "-q", "fedllm-site"))
    except (OSError, subprocess.CalledProcessError):
        return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if not has_images():
        pytest.skip("no Docker engine with the images of `make images`")
    folder = tmp_path_factory.mktemp("compose")
    for parent in (folder, *folder.parents[:2]):
        parent.chmod(0o755)  # containers run as another user
    try:
        subprocess.run([*DEMO, "up"], env=environment(folder), check=True)
        yield folder
    finally:
        subprocess.run([*DEMO, "down"], env=environment(folder), check=True)
        assert not docker("ps", "-aq", "--filter", f"label=com.docker.compose.project={PROJECT}")


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "COMPOSE_DEMO": str(folder),
        "COMPOSE_PROJECT": PROJECT,
        "GATEWAY_ADDRESS": "127.0.0.1:18443",
        "RUN_NAME": "compose-demo",
        "NUM_ROUNDS": "3",
    }


def container(service: str) -> str:
    return docker("ps", "-aq", "--filter", f"label=com.docker.compose.service={service}", "--filter", f"name={PROJECT}")


def can_reach(site: str, host: str, port: int) -> bool:
    command = ["docker", "exec", container(site), "python", "-c", CONNECT, host, str(port)]
    return subprocess.run(command, capture_output=True).returncode == 0


def address_of(service: str) -> str:
    networks = json.loads(docker("inspect", "--format", "{{json .NetworkSettings.Networks}}", container(service)))
    return str(next(iter(networks.values()))["IPAddress"])


def test_a_site_reaches_the_gateway_and_nothing_else(folder: Path) -> None:
    assert folder.is_dir()
    assert can_reach("site-a", "gateway", 8443)
    for service, port in (("site-b-node", 9094), ("superlink", 8000), ("serverapp", 9200)):
        assert not can_reach("site-a", address_of(service), port), service
        assert not can_reach("site-a", service, port), service
    assert not can_reach("site-a", "1.1.1.1", 53), "a site's network leads nowhere else"


@pytest.mark.parametrize("path", ["/v1/control/start-run", "/v1/runtime/acquire-task", "/v1/", "/"])
def test_a_site_cannot_start_a_run_or_take_a_task_through_the_gateway(folder: Path, path: str) -> None:
    assert folder.is_dir()
    for method in ("GET", "POST"):
        assert docker("exec", container("site-a"), "python", "-c", ASK, path, method) == "404"
    assert docker("exec", container("site-a"), "python", "-c", ASK, "/health", "GET") == "200"


def test_containers_are_as_tight_as_they_say(folder: Path) -> None:
    assert folder.is_dir()
    for service in ("superlink", "serverapp", "gateway", "site-a", "site-a-node"):
        found = json.loads(docker("inspect", container(service)))[0]
        assert found["HostConfig"]["ReadonlyRootfs"], service
        assert not found["Config"]["User"].startswith(("0", "root")), service
        assert found["HostConfig"]["CapDrop"] == ["ALL"], service
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is not None)"
    docker("run", "--rm", "fedllm-server", "python", "-c", probe)


def test_a_run_survives_a_killed_site_and_a_site_without_network(folder: Path) -> None:
    process = subprocess.Popen(
        [*DEMO, "run"], env=environment(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert wait_while_running(process, lambda: events(folder, "evaluation"), timeout_s=600), process.communicate()[0]
    time.sleep(5)  # sites train
    docker("kill", container("site-a"))
    docker("start", container("site-a"))
    assert wait_while_running(process, lambda: events(folder, "round"), timeout_s=600), process.communicate()[0]
    network = f"{PROJECT}_site-b"
    for service in ("site-b", "site-b-node"):
        docker("network", "disconnect", network, container(service))
    time.sleep(CUT_S)
    docker("network", "connect", "--alias", "node", network, container("site-b-node"))
    docker("network", "connect", network, container("site-b"))
    output = process.communicate(timeout=900)[0]
    [end] = events(folder, "end")
    assert end["status"] == "finished", output
    rounds = events(folder, "round")
    assert [event["round"] for event in rounds] == [1, 2, 3]
    assert any(event["participants"] == ["site-a", "site-b"] for event in rounds), output
    assert (folder / "runs" / "compose-demo" / "adapter" / "adapter_model.safetensors").is_file()


def events(folder: Path, kind: str) -> list[dict[str, object]]:
    path = folder / "runs" / "compose-demo" / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [event for event in map(json.loads, lines) if event["event"] == kind]
