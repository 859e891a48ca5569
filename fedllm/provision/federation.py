"""``federation.toml``: what an operator says about a federation, before anything is made from it.

::

    [federation]
    name = "lung-study"

    [server]
    host = "fl.example.org"

    [[sites]]
    name = "hospital-a"

    [[sites]]
    name = "hospital-b"
    own_keys = true

Evolution: keys are only added, always with a default. Every field's text is its documentation (``docs/operator.md``).
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, StrictBool, StrictFloat, StrictInt, StrictStr, model_validator

from fedllm.model.spec import Section
from fedllm.provision.tables import read_table

Scalar = StrictBool | StrictInt | StrictFloat | StrictStr
SITE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
_LABEL = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")


def is_address(name: str) -> bool:
    """Say whether a name is an IP address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _check_host(name: str) -> str:
    if not is_address(name) and not (len(name) <= 253 and all(map(_LABEL.fullmatch, name.split(".")))):
        raise ValueError("expected a DNS name or an IP address, without a port")
    return name


Host = Annotated[str, AfterValidator(_check_host)]


class FederationSection(Section):
    """The federation and how long its certificates hold."""

    name: str = Field(pattern=r"^[a-z][a-z0-9-]{0,39}$")
    """Short name in small letters, digits and hyphens; also the name of Flower's connection and of the folder made."""

    validity_days: int = Field(365, ge=1, le=825)
    """Days that the certificates of server and sites hold; `fedllm provision renew` makes the next ones."""

    authority_days: int = Field(3650, ge=2, le=7300)
    """Days that the authority's own certificate holds; when it ends, every site needs a new kit."""

    @model_validator(mode="after")
    def _check_days(self) -> FederationSection:
        if self.validity_days >= self.authority_days:
            raise ValueError(
                "validity_days must be smaller than authority_days: a certificate ends before its authority"
            )
        return self


class ServerSection(Section):
    """Where sites find the server."""

    host: Host
    """DNS name or IP address that sites connect to."""

    port: int = Field(443, ge=1, le=65535)
    """The one public port, on which the gateway listens."""

    names: tuple[Host, ...] = ()
    """More names and addresses that the server's certificate is valid for; `localhost` and its addresses always are."""

    superlink_port: int = Field(8000, ge=1, le=65535)
    """Port of the SuperLink on the server's loopback; only the operator and the gateway reach it."""

    site_certificates: bool = True
    """Let the gateway take updates only from sites that show a certificate of the federation's authority."""

    @property
    def address(self) -> str:
        """Return ``host:port`` as sites write it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def all_names(self) -> tuple[str, ...]:
        """Return all names and addresses of the server's certificate, each once."""
        return tuple(dict.fromkeys((self.host, *self.names, "localhost", "127.0.0.1", "::1")))


class SiteEntry(Section):
    """One institution."""

    name: str = Field(pattern=SITE_NAME)
    """The site's stable name: letters, digits, `.`, `_`, `-`. It names its kit and appears in reports."""

    own_keys: bool = False
    """The site makes its private keys itself and sends a request (`fedllm provision request`); its kit holds no secret."""

    node_config: dict[str, Scalar] = Field(default_factory=dict)
    """What the site's SuperNode tells Flower about it, such as a region."""

    @model_validator(mode="after")
    def _check_node_config(self) -> SiteEntry:
        if wrong := [key for key in self.node_config if key == "site-config" or not re.fullmatch(r"[\w-]+", key)]:
            raise ValueError(f"node_config: {wrong[0]!r} cannot be set here; keys are letters, digits, '_' and '-'")
        return self


class Federation(Section):
    """Everything that is made for a federation follows from this."""

    federation: FederationSection
    server: ServerSection
    sites: tuple[SiteEntry, ...] = ()

    @model_validator(mode="after")
    def _check_names(self) -> Federation:
        names = [site.name.casefold() for site in self.sites]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two sites are called {twice[0]!r} (letter case does not count)")
        return self

    @property
    def name(self) -> str:
        """Return the federation's name."""
        return self.federation.name


def read_federation(path: Path) -> Federation:
    """Read an operator's ``federation.toml``.

    Raises:
        ConfigError: The file is missing or not TOML, a key is unknown (the nearest known key is named), or a value is
            refused.
    """
    return read_table(path, Federation, "federation", fix="docs/operator.md explains every key.")
