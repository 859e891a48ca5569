"""Flower's two programs at a site: how they are started, and what their output says.

Flower 1.41 tells its state in its log alone, so this is the one file that knows its words (:func:`read_line`).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from client_app.service.folder import ServiceFolder
from client_app.service.warm import write_program
from client_app.workplace import SITE_CONFIG_KEY
from fedllm.files import atomic_write
from fedllm.provision.kit import CA, NODE_KEY, SITE, Kit
from fedllm.provision.tables import table_lines

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}
"""Nothing is told to anybody, nothing is installed at run time."""

HEARTBEAT_LAPSE_S = 60.0
"""How long the server takes a SuperNode that died without a word for connected, and refuses its key."""


def environment(folder: ServiceFolder, inherited: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of Flower's programs: ours first on the path, Flower's files inside the kit."""
    path = f"{Path(sys.executable).parent}:{inherited.get('PATH', '/usr/bin:/bin')}"
    return {"FLWR_HOME": str(folder.path / "flwr"), **inherited, **QUIET, "PATH": path}


def with_warm_clientapps(environment: Mapping[str, str], folder: ServiceFolder) -> dict[str, str]:
    """Return the SuperExec's environment: it finds our ClientApp's program first."""
    path = f"{write_program(folder.path)}:{environment['PATH']}"
    return {**environment, "PATH": path}


def write_node_config(folder: ServiceFolder, kit: Kit) -> None:
    """Write what the SuperNode tells the ClientApp."""
    values = {SITE_CONFIG_KEY: str(folder.kit / SITE), **kit.node_config}
    atomic_write(folder.node_config, table_lines(values), mode=0o600)


def supernode_command(folder: ServiceFolder, kit: Kit, port: int) -> list[str]:
    """Return the command of the SuperNode, which connects out to the server and listens on this machine's loopback only."""
    command = ["flower-supernode", "--superlink", kit.server, "--root-certificates", str(folder.kit / CA)]
    command += ["--auth-supernode-private-key", str(folder.kit / NODE_KEY), "--node-config", str(folder.node_config)]
    command += ["--isolation", "process", "--superexec-auth-secret-file", str(folder.secret)]
    return [*command, "--host", "127.0.0.1", "--port", str(port)]


def superexec_command(folder: ServiceFolder, port: int, parent: int) -> list[str]:
    """Return the command of the SuperExec, which starts a ClientApp for every message; it never leaves the loopback."""
    command = ["flower-superexec", "--insecure", "--runtime-api-address", f"127.0.0.1:{port}"]
    return [*command, "--superexec-auth-secret-file", str(folder.secret), "--parent-pid", str(parent)]


@dataclass(frozen=True)
class Event:
    """What a line of Flower's log says.

    Attributes:
        kind: ``connected`` (the detail is the node's id, or empty), ``unreachable``, ``message`` (its type), ``refused``
            (why), or ``exit`` (Flower's exit code).
        detail: As the kind says.
    """

    kind: Literal["connected", "unreachable", "message", "refused", "exit"]
    detail: str = ""


_COLORS = re.compile(r"\x1b\[[0-9;]*m")
_PATTERNS: tuple[tuple[Literal["connected", "unreachable", "message", "exit"], re.Pattern[str]], ...] = (
    ("connected", re.compile(r"SuperNode ID: (\d+)")),
    ("connected", re.compile(r"Connection successful after()")),
    ("unreachable", re.compile(r"Connection attempt failed, retrying()")),
    ("message", re.compile(r"Receiving: (\S+) message")),
    ("exit", re.compile(r"Exit Code: (\d+)")),
)
_REFUSALS = (
    (re.compile(r"\[code: 2004\]"), "not admitted"),
    (
        re.compile(r"401 Unauthorized|Invalid SuperNode authentication"),
        "the server does not take this site's signature: compare clocks",
    ),
    (
        re.compile(r"CERTIFICATE_VERIFY_FAILED|certificate verify failed"),
        "the server's certificate is not of this federation",
    ),
    (re.compile(r"SSL/TLS handshake error"), "no TLS with the server"),
)
NOT_ADMITTED = _REFUSALS[0][1]


def without_colors(line: str) -> str:
    """Return a line of Flower's log as plain text."""
    return _COLORS.sub("", line).rstrip()


def read_line(line: str) -> Event | None:
    """Return what a line of the SuperNode's log says, None for most lines."""
    for kind, pattern in _PATTERNS:
        if found := pattern.search(line):
            return Event(kind, found[1])
    return next((Event("refused", why) for pattern, why in _REFUSALS if pattern.search(line)), None)
