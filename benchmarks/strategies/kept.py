"""Finished runs as files, so that an interrupted benchmark goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.files import atomic_write

Row = dict[str, Any]


@dataclass(frozen=True)
class Kept:
    """A folder of finished runs, one JSON file each.

    A file is named by what was run and by a digest of all its settings, so a run with other settings is another one. The
    code is not in the digest: empty the folder when strategies have changed.

    Args:
        folder: Where they are, None to keep nothing.
    """

    folder: Path | None

    def get(self, name: str, seed: int, settings: Mapping[str, object]) -> Row | None:
        """Return the row of a finished run, None if there is none."""
        path = self._path(name, seed, settings)
        if path is None or not path.exists():
            return None
        row: Row = json.loads(path.read_text())["row"]
        return row

    def obtain(self, name: str, seed: int, settings: Mapping[str, object], run: Callable[[], Row]) -> Row:
        """Return the row of a run, which is done now unless it was before."""
        row = self.get(name, seed, settings)
        if row is None:
            row, path = run(), self._path(name, seed, settings)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                content = {"name": name, "seed": seed, "row": row, "settings": dict(settings)}
                atomic_write(path, json.dumps(content, indent=1) + "\n")
        return row

    def _path(self, name: str, seed: int, settings: Mapping[str, object]) -> Path | None:
        digest = hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest()[:12]
        return self.folder / f"{name}-seed{seed}-{digest}.json" if self.folder else None
