"""``fedllm provision [make] FILE``: make what is missing."""

from __future__ import annotations

import argparse
from pathlib import Path

from fedllm.cli.command import Command
from fedllm.cli.provision.file import open_federation


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="the federation's file, such as federation.toml")


def _run(arguments: argparse.Namespace) -> int:
    from fedllm.provision.make import make

    folder, federation = open_federation(arguments.file)
    done = False
    for line in make(folder, federation):
        print(line, flush=True)
        done = True
    print(f"in {folder.path}" if done else f"nothing to do in {folder.path}")
    return 0


COMMAND = Command("make", "make authority, server folder and kits; what is there stays as it is", _configure, _run)
