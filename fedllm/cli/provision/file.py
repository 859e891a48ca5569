"""The argument that all commands of an operator share: the federation's file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedllm.provision.federation import Federation
    from fedllm.provision.folder import OperatorFolder


def add_file(parser: argparse.ArgumentParser) -> None:
    """Add ``--federation``."""
    text = "the federation's file (default: federation.toml)"
    parser.add_argument("--federation", type=Path, default=Path("federation.toml"), metavar="FILE", help=text)


def open_federation(path: Path) -> tuple[OperatorFolder, Federation]:
    """Read a federation's file and find its folder.

    Raises:
        ConfigError: The file cannot be read or is wrong.
    """
    from fedllm.provision.federation import read_federation
    from fedllm.provision.folder import OperatorFolder

    federation = read_federation(path)
    return OperatorFolder.beside(path, federation), federation
