"""The operator's folder: what a federation consists of, as files.

::

    lung-study/
      authority/  ca.key ca.crt              kept by the operator, best off the server
        issued/   NAME/SERIAL.crt            every certificate that a site was ever given
      server/     everything that the server needs, for the server alone
        sites/    NAME.pub NAME.crt          sites that are in; NAME.node once registered: the id that Flower gave
        revoked/  the same of sites that are out
      kits/       NAME/ NAME.tar.gz          to be handed to the sites, then deleted here

The files are the whole record: a site is in if ``server/sites/NAME.pub`` is there, which is written last. So a command that
was interrupted is simply given again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedllm.provision.federation import Federation


@dataclass(frozen=True)
class OperatorFolder:
    """Paths of one federation.

    Attributes:
        path: The folder itself.
    """

    path: Path

    @classmethod
    def beside(cls, file: Path, federation: Federation) -> OperatorFolder:
        """Return the folder of a federation, beside its ``federation.toml``."""
        return cls(file.absolute().parent / federation.name)

    def make(self) -> None:
        """Make all folders, for their owner alone."""
        records = (self.authority, self.authority / "issued", self.sites, self.revoked)
        for folder in (self.path, self.server, *records, self.flower, self.units, self.kits):
            folder.mkdir(mode=0o700, exist_ok=True)

    @property
    def authority(self) -> Path:
        """Return the folder of the authority."""
        return self.path / "authority"

    def issued(self, site: str) -> Path:
        """Return the folder of all certificates that a site was given."""
        return self.authority / "issued" / site

    @property
    def server(self) -> Path:
        """Return the folder that the server needs."""
        return self.path / "server"

    @property
    def flower(self) -> Path:
        """Return ``FLWR_HOME`` of the operator's ``flwr``."""
        return self.server / "flwr"

    @property
    def units(self) -> Path:
        """Return the folder of the server's systemd units."""
        return self.server / "systemd"

    @property
    def sites(self) -> Path:
        """Return the folder of the sites that are in."""
        return self.server / "sites"

    @property
    def revoked(self) -> Path:
        """Return the folder of the sites that are out."""
        return self.server / "revoked"

    @property
    def kits(self) -> Path:
        """Return the folder of the kits."""
        return self.path / "kits"

    def is_in(self, site: str) -> bool:
        """Say whether a site has been let in."""
        return (self.sites / f"{site}.pub").is_file()

    def is_out(self, site: str) -> bool:
        """Say whether a site has been revoked."""
        return (self.revoked / f"{site}.pub").is_file()

    def site_names(self) -> Iterator[str]:
        """Yield the names of the sites that are in, sorted."""
        yield from sorted(path.stem for path in self.sites.glob("*.pub"))
