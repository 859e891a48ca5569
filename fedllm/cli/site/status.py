"""``fedllm site status``: whether the site serves, in one line."""

from __future__ import annotations

import argparse
from pathlib import Path

from fedllm.cli.command import Command, add_json, print_json
from fedllm.cli.site.kit import add_kit


def _configure(parser: argparse.ArgumentParser) -> None:
    add_kit(parser)
    add_json(parser)


def _run(arguments: argparse.Namespace) -> int:
    from client_app.service.control import site_status

    status = site_status(Path(arguments.kit))
    if arguments.json:
        print_json(status.model_dump())
    else:
        print(status.sentence())
    return 0 if status.is_running else 1


COMMAND = Command("status", "say whether the site serves, since when, and whether it is connected", _configure, _run)
