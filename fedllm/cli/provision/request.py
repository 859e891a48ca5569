"""``fedllm provision request``: make a site's private keys at the site."""

from __future__ import annotations

import argparse
from pathlib import Path

from fedllm.cli.command import Command


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", required=True, metavar="SITE", help="the site's name, as the operator knows it")
    text = "folder for the keys, which the kit is unpacked over later (default: the site's name)"
    parser.add_argument("--into", type=Path, metavar="FOLDER", help=text)


def _run(arguments: argparse.Namespace) -> int:
    from fedllm.provision.request import REQUEST, make_request

    folder = arguments.into or Path(arguments.name)
    request = make_request(folder, arguments.name)
    print(f"send {folder / REQUEST} to the operator; the private keys beside it stay here")
    print(f"fingerprint, to be compared by telephone: {request.fingerprint}")
    return 0


COMMAND = Command("request", "at a site: make its private keys and a request for the operator", _configure, _run)
