"""``fedllm site metrics``: what Prometheus would be told about this site, as text.

For a node exporter that reads files, where no port is to be opened::

    fedllm site metrics > /var/lib/node_exporter/fedllm.prom.new && mv /var/lib/node_exporter/fedllm.prom.new ...
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fedllm.cli.command import Command
from fedllm.cli.site.kit import add_kit


def _configure(parser: argparse.ArgumentParser) -> None:
    add_kit(parser)


def _run(arguments: argparse.Namespace) -> int:
    from client_app.observability.show import site_board
    from client_app.service.control import site_status
    from client_app.site import load_site_config
    from fedllm.observability.endpoint import as_text

    kit = Path(arguments.kit)
    file = kit / "site.toml" if kit.is_dir() else kit
    owner, status = load_site_config(file), site_status(file.parent)
    print(as_text(site_board(owner, status if status.is_running else None), {"site": owner.site.name}), end="")
    return 0


COMMAND = Command("metrics", "print what Prometheus is told about this site", _configure, _run)
