"""``fedllm provision revoke``: let a site out."""

from __future__ import annotations

import argparse

from fedllm.cli.command import Command
from fedllm.cli.provision.file import add_file, open_federation


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("site", metavar="SITE", help="the site's name")
    add_file(parser)


def _run(arguments: argparse.Namespace) -> int:
    from fedllm.provision.change import revoke

    folder, federation = open_federation(arguments.federation)
    for line in revoke(folder, federation, arguments.site):
        print(line)
    return 0


COMMAND = Command("revoke", "let a site out: its keys and certificates hold no longer", _configure, _run)
