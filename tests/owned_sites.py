"""Sites with a data owner's file, for the federation of :mod:`tests.tiny_federation`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from client_app.audit.log import AuditLog, read_lines
from client_app.site import SiteConfig, load_site_config
from tests.fake_federation import Handler, InProcessGrid
from tests.tiny_federation import real_site, tiny_sites

HEAD = '[site]\nname = "clinic"\n[data]\nsource = "file:own.jsonl"\n'


def owned(home: Path, text: str = "", *, num_rows: int = 20) -> SiteConfig:
    """Write a site's file and its data, and return what the file says.

    Args:
        home: The folder of the file.
        text: What follows the sections `[site]` and `[data]`.
        num_rows: Examples.
    """
    rows = [json.dumps({"prompt": f"owned {n}", "completion": "yes " * (1 + n % 3)}) for n in range(num_rows)]
    (home / "own.jsonl").write_text("\n".join(rows))
    path = home / "clinic.toml"
    path.write_text(HEAD + text)
    return load_site_config(path)


def owned_site(home: Path) -> Handler:
    """Return a ClientApp on a node that names the file which :func:`owned` wrote."""
    return real_site({"site-config": str(home / "clinic.toml")})


def grid_with_owned(home: Path, text: str = "", *, others: int = 2, num_rows: int = 20) -> InProcessGrid:
    """Return simulated sites and, last, one with this file."""
    owned(home, text, num_rows=num_rows)
    return InProcessGrid({**tiny_sites(others), 200: owned_site(home)})


def written(home: Path) -> list[dict[str, Any]]:
    """Return what the site's audit log says; every line fits."""
    lines = list(read_lines(AuditLog(home / "state" / "audit")))
    assert not [line for line in lines if line.problem]
    return [dict(line.record) for line in lines if line.record is not None]
