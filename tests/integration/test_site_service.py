"""A site's kit in real processes: SuperLink with TLS and node authentication, the gateway, and ``fedllm site start``."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from client_app.service.control import site_status
from fedllm.cli.main import main
from tests.flower_deployment import _end, _wait_for
from tests.free_ports import free_ports

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
SHORT_HEARTBEAT = """
import flwr.common.constant
flwr.common.constant.HEARTBEAT_DEFAULT_INTERVAL = flwr.common.constant.HEARTBEAT_MIN_INTERVAL
"""
"""Lets the server take a killed SuperNode for connected for 20 s instead of 60."""


@pytest.fixture
def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Provision a federation, run its server from the scripts made, register its site, and unpack the site's kit."""
    superlink, public = free_ports(2)
    public = public if NGINX else superlink
    (tmp_path / "sitecustomize.py").write_text(SHORT_HEARTBEAT)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}:/usr/sbin")
    (tmp_path / "federation.toml").write_text(
        f'[federation]\nname = "loopback"\n[server]\nhost = "127.0.0.1"\nport = {public}\nsuperlink_port = {superlink}\n'
        '[[sites]]\nname = "hospital-a"\n'
    )
    assert main(["provision", str(tmp_path / "federation.toml")]) == 0
    server = tmp_path / "loopback" / "server"
    scripts = ["superlink.sh"]
    if NGINX:
        scripts += ["gateway.sh"]
        text = (server / "nginx.conf").read_text().replace(f"listen {public}", f"listen 127.0.0.1:{public}")
        (server / "nginx.conf").write_text(text.replace("/tmp/fedllm-gateway", str(tmp_path / "gateway")))
    with (tmp_path / "server.log").open("wb") as log:
        servers = [subprocess.Popen([server / name], stdout=log, stderr=subprocess.STDOUT) for name in scripts]
        try:
            for port in {superlink, public}:
                _wait_for(port)
            subprocess.run([server / "register.sh"], check=True, stdout=log, stderr=subprocess.STDOUT)
            shutil.unpack_archive(
                tmp_path / "loopback" / "kits" / "hospital-a.tar.gz", tmp_path / "site", filter="data"
            )
            yield tmp_path / "site" / "hospital-a"
        finally:
            main(["site", "stop", str(tmp_path / "site" / "hospital-a")])
            _end(servers)


def _wait_until(is_so: Callable[[], bool], timeout_s: float, kit: Path) -> None:
    end = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < end, (kit / "service" / "log").read_text()[-4000:]
        time.sleep(0.1)


def _supernode(kit: Path) -> psutil.Process:
    """Return the SuperNode, a program right below the service."""
    below = psutil.Process(site_status(kit).pid).children()
    return next(child for child in below if "flower-supernode" in " ".join(child.cmdline()))


def test_a_site_starts_from_its_kit_survives_kills_and_is_shut_out_once_revoked(
    kit: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["site", "start", str(kit)]) == 0
    _wait_until(lambda: site_status(kit).phase == "connected", 60, kit)
    node = site_status(kit).node_id
    assert node == (kit.parents[1] / "loopback" / "server" / "sites" / "hospital-a.node").read_text().strip()
    assert main(["site", "start", str(kit)]) == 2, "one service a site"
    main(["site", "status", str(kit)])
    said = capsys.readouterr()
    assert "already served" in said.err
    assert re.search(rf"^running since .* \(process \d+\); connected as node {node}$", said.out, re.MULTILINE)
    assert (kit / "service" / "superexec.secret").stat().st_mode & 0o777 == 0o600

    supernode = _supernode(kit)
    supernode.kill()
    _wait_until(lambda: site_status(kit).num_restarts > 0, 60, kit)
    _wait_until(lambda: site_status(kit).phase == "connected", 120, kit)
    assert site_status(kit).node_id == node
    assert _supernode(kit) != supernode

    service = psutil.Process(site_status(kit).pid)
    family = service.children(recursive=True)
    service.kill()
    assert len(family) >= 2
    assert not psutil.wait_procs([service, *family], timeout=60)[1], "nothing of a service outlives it"
    assert main(["site", "status", str(kit)]) == 1

    operator = kit.parents[1]
    assert main(["provision", "revoke", "hospital-a", "--federation", str(operator / "federation.toml")]) == 0
    unregister = [operator / "loopback" / "server" / "register.sh"]
    said = subprocess.run(unregister, check=True, capture_output=True, text=True)
    assert f"SuperNode {node} unregistered" in said.stdout
    assert main(["site", "start", str(kit)]) == 0
    _wait_until(lambda: "not admitted" in site_status(kit).note, 60, kit)
    family = psutil.Process(site_status(kit).pid).children(recursive=True)
    assert main(["site", "stop", str(kit)]) == 0
    assert site_status(kit).sentence() == "not running"
    assert not psutil.wait_procs(family, timeout=60)[1]
