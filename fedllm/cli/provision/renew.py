"""``fedllm provision renew``: new certificates for the same keys."""

from __future__ import annotations

import argparse
from datetime import timedelta

from fedllm.cli.command import Command
from fedllm.cli.provision.file import add_file, open_federation


def _configure(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("site", nargs="?", default="", metavar="SITE", help="this site alone")
    which.add_argument("--server", action="store_true", help="the server alone")
    text = "without a site or --server: whatever ends within so many days (default: 60)"
    parser.add_argument("--within", type=int, default=60, metavar="DAYS", help=text)
    add_file(parser)


def _run(arguments: argparse.Namespace) -> int:
    from fedllm.provision.change import renew_due, renew_servers, renew_site

    folder, federation = open_federation(arguments.federation)
    if arguments.server:
        lines = list(renew_servers(folder, federation))
    elif arguments.site:
        lines = list(renew_site(folder, federation, arguments.site))
    else:
        lines = list(renew_due(folder, federation, timedelta(days=arguments.within)))
    print("\n".join(lines) or f"nothing ends within {arguments.within} days")
    return 0


COMMAND = Command("renew", "sign new certificates before the old ones end", _configure, _run)
