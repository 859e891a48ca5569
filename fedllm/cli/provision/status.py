"""``fedllm provision status``: who is in, and until when certificates hold."""

from __future__ import annotations

import argparse
from datetime import timedelta

from fedllm.cli.command import Command, add_json, print_json
from fedllm.cli.provision.file import add_file, open_federation
from fedllm.text import table


def _configure(parser: argparse.ArgumentParser) -> None:
    add_file(parser)
    text = "exit with status 1 if a certificate ends within so many days (default: 30)"
    parser.add_argument("--within", type=int, default=30, metavar="DAYS", help=text)
    add_json(parser)


def _run(arguments: argparse.Namespace) -> int:
    from fedllm.provision.inventory import inventory

    holdings = list(inventory(*open_federation(arguments.federation)))
    rows = [
        {
            "name": one.name,
            "state": one.state if one.is_in_file else f"{one.state}, not in the file",
            "until": one.until.date().isoformat() if one.until else None,
            "days_left": one.days_left,
            "node_id": one.node_id,
        }
        for one in holdings
    ]
    if arguments.json:
        print_json(rows)
    else:
        cells = [tuple("-" if value in (None, "") else str(value) for value in row.values()) for row in rows]
        print("\n".join(table([("name", "state", "until", "days left", "node"), *cells], "<<<><")))
    return int(any(one.is_due(timedelta(days=arguments.within)) for one in holdings))


COMMAND = Command("status", "show who is in and when certificates end", _configure, _run)
