"""``fedllm report``: make a run's report anew from its files."""

from __future__ import annotations

import argparse

from fedllm.cli.command import Command, add_home, find_run


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", nargs="?", default="", metavar="RUN", help="name or folder of a run (default: the newest)"
    )
    text = 'print the bare path, as for xdg-open "$(fedllm report --open-path)"'
    parser.add_argument("--open-path", action="store_true", help=text)
    add_home(parser)


def _run(arguments: argparse.Namespace) -> int:
    from server_app.report import build_report

    path = build_report(find_run(arguments.run, arguments.home))
    print(path if arguments.open_path else f"wrote {path}")
    return 0


COMMAND = Command("report", "make a run's report.html anew from the run's files", _configure, _run)
