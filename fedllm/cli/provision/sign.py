"""``fedllm provision sign``: let a site in that made its own keys."""

from __future__ import annotations

import argparse
from pathlib import Path

from fedllm.cli.command import Command
from fedllm.cli.provision.file import add_file, open_federation


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("request", type=Path, metavar="REQUEST", help="the site's request.json")
    add_file(parser)


def _run(arguments: argparse.Namespace) -> int:
    from fedllm.provision.change import sign
    from fedllm.provision.request import read_request

    folder, federation = open_federation(arguments.federation)
    for line in sign(folder, federation, read_request(arguments.request)):
        print(line)
    return 0


COMMAND = Command("sign", "sign a site's request and make its kit", _configure, _run)
