"""What the service of a site reads in Flower's log, and how it waits."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client_app.service.backoff import LONGEST_S, REFUSED_S, Backoff
from client_app.service.child import Child
from client_app.service.flower import (
    Event,
    environment,
    read_line,
    superexec_command,
    supernode_command,
    write_node_config,
)
from client_app.service.folder import ServiceFolder
from fedllm.cli.main import main
from fedllm.provision.kit import Kit

KIT = Kit(
    federation="lung-study", site="a", server="fl.example.org:443", node_config={"region": 'the "north"', "beds": 3}
)


@pytest.mark.parametrize(
    ("line", "event"),
    [
        ("\x1b[92mINFO \x1b[0m:      SuperNode ID: 15276402867019502385", Event("connected", "15276402867019502385")),
        ("INFO :      Connection successful after 0.56 seconds and 2 tries.", Event("connected", "")),
        ("WARNING :   Connection attempt failed, retrying in 0.53 seconds", Event("unreachable", "")),
        ("INFO :      Receiving: train message (ID: 8f2a)", Event("message", "train")),
        ("ERROR :     Exit Code: 305", Event("exit", "305")),
        ("[code: 2004] Node activation failed.", Event("refused", "not admitted")),
        ("INFO:     Application startup complete.", None),
    ],
)
def test_flowers_lines_are_understood(line: str, event: Event | None):
    assert read_line(line) == event


def test_flower_still_writes_the_lines_that_are_read():
    """The service reads Flower's log, so an upgrade that rewords it must be noticed."""
    import flwr

    root = Path(flwr.__file__).parent
    sources = {
        "supernode/start_client_internal.py": ("SuperNode ID: %s", "Receiving: %s message"),
        "supercore/retry/http_retry.py": ("Connection successful after", "Connection attempt failed, retrying"),
        "supercore/exit/exit.py": ("Exit Code: {code}",),
        "supernode/fleet_http_connection.py": ("[code: {flower_error.code}]",),
        "supercore/error/base.py": ("FLEET_NODE_ACTIVATION_FAILED = 2004",),
    }
    for file, words in sources.items():
        text = (root / file).read_text()
        assert [word for word in words if word not in text] == [], file


@given(lives=st.lists(st.floats(0, 1000), max_size=30), lapses=st.booleans())
def test_waits_grow_to_a_bound_and_never_to_nothing(lives: list[float], lapses: bool):
    backoff = Backoff()
    for life in lives:
        wait = backoff.next_wait_s(life_s=life, lapses=lapses)
        assert (REFUSED_S / 2 if lapses else 1.0) <= wait <= (REFUSED_S if lapses else LONGEST_S)
        if life > 60 and not lapses:
            assert wait <= 2.0, "a start that held is not held against the next"


def test_flowers_own_reader_gets_the_node_config_back(tmp_path: Path):
    from flwr.common.config import parse_config_args

    folder = ServiceFolder(tmp_path)
    folder.make()
    write_node_config(folder, KIT)
    read = parse_config_args([str(folder.node_config)])
    assert read == {"site-config": str(tmp_path / "site.toml"), "region": 'the "north"', "beds": 3}


def test_flower_takes_the_commands_and_opens_no_port_to_others(tmp_path: Path):
    from flwr.supercore.superexec import run_superexec  # noqa: F401 - the module must be there
    from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

    folder = ServiceFolder(tmp_path)
    parsed = _parse_args_run_supernode().parse_args(supernode_command(folder, KIT, 12345)[1:])
    assert (parsed.superlink, parsed.insecure, parsed.isolation) == ("fl.example.org:443", False, "process")
    assert (parsed.host, parsed.port) == ("127.0.0.1", 12345)
    assert parsed.root_certificates == str(tmp_path / "ca.crt")
    assert parsed.auth_supernode_private_key == str(tmp_path / "node.key")
    assert not parsed.runtime_dependency_install
    assert "127.0.0.1:12345" in superexec_command(folder, 12345, 1)


def test_nothing_is_told_or_installed_whatever_was_set_before(tmp_path: Path):
    given_ = {"FLWR_TELEMETRY_ENABLED": "1", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "0", "PATH": "/bin"}
    made = environment(ServiceFolder(tmp_path), given_)
    assert made["FLWR_TELEMETRY_ENABLED"] == "0"
    assert made["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert made["PATH"].split(":") == [str(Path(sys.executable).parent), "/bin"]


def test_a_child_is_ended_with_all_that_it_started_even_if_it_does_not_listen():
    deaf = "import signal, subprocess, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    program = (
        deaf
        + "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); print(p.pid, flush=True); p.wait()"
    )
    lines: list[str] = []
    heard = threading.Event()
    child = Child([sys.executable, "-c", program], os.environ, lambda line: (lines.append(line), heard.set())[1])
    assert heard.wait(30)
    below = psutil.Process(int(lines[0]))
    assert not child.has_ended
    child.end(grace_s=0.5)
    assert child.has_ended
    assert not psutil.wait_procs([below], timeout=60)[1]


def test_a_folder_that_is_no_kit_and_a_wrong_site_file_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["site", "start", str(tmp_path)]) == 2
    assert "this is not a site's kit" in capsys.readouterr().err
    (tmp_path / "kit.toml").write_text('federation = "f"\nsite = "a"\nserver = "localhost:1"\n')
    (tmp_path / "site.toml").write_text('[site]\nname = "a"\n[data]\nsorce = "file:x"\n')
    for arguments in ([], ["--foreground"]):
        assert main(["site", "start", str(tmp_path), *arguments]) == 2
        assert "unknown site config key 'data.sorce'" in capsys.readouterr().err
    assert not (tmp_path / "service" / "lock").exists()
