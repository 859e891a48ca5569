"""``fedllm site stop``: end what ``fedllm site start`` began."""

from __future__ import annotations

import argparse
from pathlib import Path

from fedllm.cli.command import Command
from fedllm.cli.site.kit import add_kit


def _configure(parser: argparse.ArgumentParser) -> None:
    add_kit(parser)


def _run(arguments: argparse.Namespace) -> int:
    from client_app.service.control import stop_site

    print("stopped" if stop_site(Path(arguments.kit)) else "not running")
    return 0


COMMAND = Command("stop", "end the site's processes; training under way is given up", _configure, _run)
