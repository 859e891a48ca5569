"""What a result depends on besides config and data: releases of the software, revision of the source."""

from __future__ import annotations

import platform
import subprocess
import tomllib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

_DISTRIBUTIONS = ("fedllm", "flwr", "numpy", "torch", "transformers", "peft", "bitsandbytes")


def versions() -> dict[str, str]:
    """Return the releases of Python and of what is installed of our stack; nothing is imported for it.

    The release of ``fedllm`` is that of the copy that runs: Flower runs its own, perhaps not the installed one.
    """
    found = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found | {"fedllm": str(own_project().get("version") or found.get("fedllm") or "unknown")}


def own_project() -> Mapping[str, Any]:
    """Return the ``[project]`` table of the copy of fedllm that runs; just the name if installed as a package."""
    found = project(Path(__file__).parents[1])
    return found if found and {"name", "version"} <= found.keys() else {"name": "fedllm"}


def own_app() -> str:
    """Return ``publisher/name`` of the Flower app that this copy of fedllm belongs to, as it states itself."""
    found = _table(Path(__file__).parents[1])
    app = found.get("tool", {}).get("flwr", {}).get("app", {})
    return f"{app.get('publisher', 'unknown')}/{found.get('project', {}).get('name', 'unknown')}"


def project(folder: Path) -> Mapping[str, Any] | None:
    """Return the ``[project]`` table of a folder's ``pyproject.toml``, None where there is no readable one."""
    table = _table(folder).get("project")
    return table if isinstance(table, dict) else None


def _table(folder: Path) -> dict[str, Any]:
    try:
        return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def git_revision(folder: Path) -> str | None:
    """Return the commit of the checkout a folder lies in, ``+changes`` if files differ from it; None outside git."""
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if changed else commit


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
