"""``fedllm site start``: serve a federation from this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from fedllm.cli.command import Command
from fedllm.cli.site.kit import add_kit


def _configure(parser: argparse.ArgumentParser) -> None:
    add_kit(parser)
    text = "stay in this terminal, as systemd, containers and Slurm want it"
    parser.add_argument("--foreground", action="store_true", help=text)
    parser.add_argument("--quiet", action="store_true", help="with --foreground: write to the log file alone")


def _run(arguments: argparse.Namespace) -> int:
    kit = Path(arguments.kit)
    if arguments.foreground:
        from client_app.service.run import run_service

        run_service(kit, echo=not arguments.quiet)
        return 0
    from client_app.service.control import start_site

    status = start_site(kit)
    print(status.sentence())
    return 0 if status.is_running else 1


COMMAND = Command("start", "serve the federation until stopped, whatever ends in between", _configure, _run)
