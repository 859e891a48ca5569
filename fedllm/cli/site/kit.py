"""The argument that most commands of a site share: its kit's folder."""

from __future__ import annotations

import argparse


def add_kit(parser: argparse.ArgumentParser) -> None:
    """Add the folder of the site's kit."""
    text = "folder of the site's kit (default: the current directory)"
    parser.add_argument("kit", nargs="?", default=".", metavar="KIT", help=text)
