"""What a federation holds, and until when: authority, server, sites."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from fedllm.provision.authority import read_certificate
from fedllm.provision.federation import Federation
from fedllm.provision.folder import OperatorFolder

State = Literal["authority", "server", "in", "revoked", "awaits request", "no kit yet"]


@dataclass(frozen=True)
class Holding:
    """One party of a federation.

    Attributes:
        name: The site's name, or ``authority``, ``server``.
        state: What it is.
        until: When its certificate ends; None where it has none, or none that counts.
        node_id: Flower's id of a registered site, else empty.
        is_in_file: ``federation.toml`` names it.
    """

    name: str
    state: State
    until: datetime | None
    node_id: str = ""
    is_in_file: bool = True

    @property
    def days_left(self) -> int | None:
        """Return the whole days until its certificate ends, negative afterwards."""
        return None if self.until is None else (self.until - datetime.now(UTC)).days

    def is_due(self, within: timedelta) -> bool:
        """Say whether its certificate ends within a time."""
        return self.until is not None and self.until - datetime.now(UTC) < within


def inventory(folder: OperatorFolder, federation: Federation) -> Iterator[Holding]:
    """Yield authority, server, and every site of the file or the folder.

    Raises:
        ConfigError: Nothing has been made yet, or a certificate is broken.
    """
    yield Holding("authority", "authority", read_certificate(folder.authority / "ca.crt").not_valid_after_utc)
    yield Holding("server", "server", read_certificate(folder.server / "server.crt").not_valid_after_utc)
    own_keys = {site.name: site.own_keys for site in federation.sites}
    revoked = {path.stem for path in folder.revoked.glob("*.pub")}
    for name in sorted({*own_keys, *folder.site_names(), *revoked}):
        if folder.is_in(name):
            node = folder.sites / f"{name}.node"
            node_id = node.read_text().strip() if node.exists() else ""
            until = read_certificate(folder.sites / f"{name}.crt").not_valid_after_utc
            yield Holding(name, "in", until, node_id, name in own_keys)
        elif name in revoked:
            yield Holding(name, "revoked", None, is_in_file=name in own_keys)
        else:
            yield Holding(name, "awaits request" if own_keys[name] else "no kit yet", None)
