"""Lay real text into two sites' folders: topics of the ChatterBot corpus, no topic at both.

Usage: demo_data.py FOLDER
"""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

SITES = ("site-a", "site-b")


def main(folder: Path) -> None:
    """Copy every other topic to each site."""
    spec = find_spec("chatterbot_corpus")
    assert spec is not None, "chatterbot-corpus is not installed; see deploy/demo/packages.txt"
    assert spec.origin is not None, "a package with files"
    topics = sorted((Path(spec.origin).parent / "data" / "english").glob("*.yml"))
    for index, topic in enumerate(topics):
        data = folder / SITES[index % len(SITES)] / "data"
        data.mkdir(parents=True, exist_ok=True)
        shutil.copy(topic, data)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
