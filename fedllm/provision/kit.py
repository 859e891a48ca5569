"""A site's kit: what an institution needs to take part, in one folder.

==============  ========================================================================================
``kit.toml``    where the server is; read by ``fedllm site start`` (:class:`Kit`)
``site.toml``   the data owner's own file, to be filled in
``ca.crt``      the federation's authority, which the site trusts
``node.key``    the SuperNode's private key, ``node.pub`` the public one, which the server registers
``site.key``    private key of the site's certificate ``site.crt``, shown to the gateway with every update
the rest        a page to read, and ways to start: a script, a systemd unit, a Slurm job, a compose file
==============  ========================================================================================

Evolution: keys of ``kit.toml`` are only added, always with a default; files are only added.
"""

from __future__ import annotations

import json
import re
import tarfile
from pathlib import Path

from pydantic import Field

from fedllm.errors import ConfigError, explain
from fedllm.files import atomic_write
from fedllm.model.spec import Section
from fedllm.provision.federation import SITE_NAME, Federation, Scalar, SiteEntry
from fedllm.provision.tables import read_table, table_lines
from fedllm.provision.templates import filled, read_template

KIT, SITE, CA = "kit.toml", "site.toml", "ca.crt"
NODE_KEY, NODE_PUBLIC = "node.key", "node.pub"
CERTIFICATE, CERTIFICATE_KEY = "site.crt", "site.key"
_TEMPLATES = {
    "README.md": ("site-kit/README.md", 0o600),
    "start.sh": ("site-kit/start.sh", 0o700),
    "compose.yaml": ("site-kit/compose.yaml", 0o600),
    "fedllm-site.service": ("systemd/fedllm-site.service", 0o600),
    "fedllm-site.sbatch": ("slurm/fedllm-site.sbatch", 0o700),
}


class Kit(Section):
    """What a site's service must know about the federation."""

    federation: str
    """The federation's name."""

    site: str = Field(pattern=SITE_NAME)
    """The site's name in it."""

    server: str = Field(pattern=r"^\S+:\d+$")
    """``host:port`` of the gateway."""

    node_config: dict[str, Scalar] = Field(default_factory=dict)
    """What the SuperNode tells Flower about the site."""


def read_kit(folder: Path) -> Kit:
    """Read a kit's own file.

    Raises:
        ConfigError: The folder is no kit, or its file is broken.
    """
    if not (folder / KIT).is_file():
        fix = "Name the folder that the kit was unpacked into."
        raise ConfigError(explain("this is not a site's kit", expected=f"a folder with {KIT}", where=folder, fix=fix))
    return read_table(folder / KIT, Kit, "kit", fix="Take the file anew from the kit.")


def write_kit_files(folder: Path, federation: Federation, site: SiteEntry) -> None:
    """Write everything of a kit but its keys and certificates."""
    values = {
        "FEDERATION": federation.name,
        "SITE": site.name,
        "SERVER": federation.server.address,
        "DAYS": federation.federation.validity_days,
    }
    atomic_write(folder / KIT, _kit_file(federation, site), mode=0o600)
    atomic_write(folder / SITE, _site_file(federation, site), mode=0o600)
    for name, (template, mode) in _TEMPLATES.items():
        atomic_write(folder / name, filled(template, values), mode=mode)


def pack(folder: Path, archive: Path) -> None:
    """Pack a folder into a ``.tar.gz`` for its owner alone, with the modes of its files and nobody's name."""
    staged = archive.with_name(f".{archive.name}.tmp")
    staged.unlink(missing_ok=True)
    staged.touch(mode=0o600)
    with tarfile.open(staged, "w:gz") as tar:
        tar.add(folder, folder.name, filter=_anonymous)
    staged.replace(archive)


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def _kit_file(federation: Federation, site: SiteEntry) -> str:
    values: dict[str, Scalar] = {"federation": federation.name, "site": site.name, "server": federation.server.address}
    text = "# Read by `fedllm site start`; nothing in it is secret.\n" + table_lines(values)
    return text + (f"\n[node_config]\n{table_lines(site.node_config)}" if site.node_config else "")


def _site_file(federation: Federation, site: SiteEntry) -> str:
    """Fill the example of a site's file in; a line that the example no longer has is a defect of ours."""
    lines = {"name": site.name, "address": federation.server.address, "ca": CA}
    lines |= {"certificate": CERTIFICATE, "key": CERTIFICATE_KEY}
    text = read_template("site.example.toml")
    for key, value in lines.items():
        text, times = re.subn(rf'(?m)^(?:# )?{key} = ".*"$', lambda _: f"{key} = {json.dumps(value)}", text)  # noqa: B023
        assert times == 1, f"deploy/site.example.toml has {times} lines for {key!r}"
    return text
