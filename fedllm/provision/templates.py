"""The files under ``deploy/`` from which kits are filled in.

They are real files, so that a person can read them without this program. In a checkout they lie beside the packages; an
installed fedllm has them as ``share/fedllm/deploy`` (``[tool.setuptools.data-files]`` in ``pyproject.toml``), found through
the record of what was installed, wherever that is.

A place to fill in is ``@NAME@``, which neither shells nor systemd, Slurm, YAML or nginx give a meaning.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import fedllm
from fedllm.errors import ConfigError, explain

_MARK = "site.example.toml"


def deploy_folder() -> Path:
    """Return the folder of the templates.

    Raises:
        ConfigError: It was not installed.
    """
    root = Path(fedllm.__file__).resolve().parents[1]
    for folder in (root / "deploy", *_installed(), root / "share" / "fedllm" / "deploy"):
        if (folder / _MARK).is_file():
            return folder
    raise ConfigError(explain("the templates of kits are not installed", where=root, fix="Install fedllm anew."))


def _installed() -> Iterator[Path]:
    """Yield where the installer says it put them; `pip --target` says it wrongly and puts them beside the packages."""
    try:
        files = distribution("fedllm").files or []
    except PackageNotFoundError:
        return
    for file in files:
        if file.name == _MARK:
            yield Path(str(file.locate())).resolve().parent


def read_template(name: str) -> str:
    """Return a template's text.

    Args:
        name: Path below ``deploy/``.
    """
    return (deploy_folder() / name).read_text(encoding="utf-8")


def filled(name: str, values: Mapping[str, object]) -> str:
    """Return a template's text with its places filled in; a place without a value is a defect of ours."""
    return re.sub(r"@([A-Z_]+)@", lambda place: str(values[place[1]]), read_template(name))
