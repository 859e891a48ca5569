"""What an operator does to a federation that exists: sign a request, revoke a site, renew certificates."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from fedllm.errors import ConfigError, explain
from fedllm.provision import kit
from fedllm.provision.authority import Authority, read_certificate, write_certificate
from fedllm.provision.federation import Federation, SiteEntry
from fedllm.provision.folder import OperatorFolder
from fedllm.provision.inventory import inventory
from fedllm.provision.keys import PublicKey, read_public_line
from fedllm.provision.make import finish_kit, issue, staged_kit
from fedllm.provision.request import SiteRequest
from fedllm.provision.server import renew_server, write_revocations


def sign(folder: OperatorFolder, federation: Federation, request: SiteRequest) -> Iterator[str]:
    """Sign a site's request and make its kit, which holds no private key.

    Raises:
        ConfigError: The request was changed, is of nobody in ``federation.toml``, or of a site that is in or out already.
    """
    node, own = request.public_keys()
    site = _entry(federation, request.site)
    if folder.is_in(site.name) or folder.is_out(site.name):
        found = "let in already" if folder.is_in(site.name) else "revoked"
        fix = "Revoke it first, and give the site another name, if its keys are to change."
        raise ConfigError(explain(f"{site.name} is {found}", where=folder.sites, fix=fix))
    if known := _known(folder, node):
        raise ConfigError(explain("this request's node key is known as another site's", found=known, where=folder.path))
    authority = Authority.read(folder.authority)
    finish_kit(folder, federation, authority, site, staged_kit(folder, site.name), node, own)
    yield f"signed the request of {site.name} with fingerprint {request.fingerprint}"
    yield f"made kits/{site.name}.tar.gz, to be unpacked over the site's own folder"


def revoke(folder: OperatorFolder, federation: Federation, site: str) -> Iterator[str]:
    """Let a site out; a second call says again what is to be done.

    Flower hands out work, and with it the tickets of the update stream, to registered nodes alone, so unregistering ends
    everything. The list of revoked certificates shuts the gateway's update stream as well.

    Raises:
        ConfigError: There is no such site.
    """
    if not folder.is_in(site) and not folder.is_out(site):
        raise ConfigError(explain(f"{site} has not been let in", where=folder.sites))
    for suffix in (".crt", ".node", ".pub"):  # the last is what says that it is in
        path = folder.sites / f"{site}{suffix}"
        if path.exists():
            path.replace(folder.revoked / path.name)
    write_revocations(folder, Authority.read(folder.authority))
    yield f"revoked {site}; at the server, with the new contents of {folder.server}:"
    node = folder.revoked / f"{site}.node"
    if node.exists():
        home = shlex.quote(str(folder.flower))
        yield f"  FLWR_HOME={home} flwr supernode unregister {node.read_text().strip()} {federation.name}"
        yield "  or ./register.sh, which does it"
    else:
        yield "  ./register.sh, which unregisters it if it was registered there"
    yield "  kill -HUP $(cat /tmp/fedllm-gateway.pid), so that the gateway reads revoked.pem"


def renew_site(folder: OperatorFolder, federation: Federation, site: str) -> Iterator[str]:
    """Sign a new certificate for a site's key, and pack it for the site.

    Raises:
        ConfigError: There is no such site.
    """
    if not folder.is_in(site):
        raise ConfigError(explain(f"{site} has not been let in", where=folder.sites))
    authority = Authority.read(folder.authority)
    public = read_certificate(folder.sites / f"{site}.crt").public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    certificate = issue(folder, federation, authority, site, public)
    archive = folder.kits / f"{site}-renewal.tar.gz"
    _pack_renewal(folder, authority, site, certificate, archive)
    write_certificate(folder.sites / f"{site}.crt", certificate)
    if (folder.kits / site).is_dir():
        write_certificate(folder.kits / site / kit.CERTIFICATE, certificate)
        kit.pack(folder.kits / site, folder.kits / f"{site}.tar.gz")
    yield f"renewed {site} until {certificate.not_valid_after_utc:%Y-%m-%d}: send kits/{archive.name}"


def renew_servers(folder: OperatorFolder, federation: Federation) -> Iterator[str]:
    """Sign a new certificate for the server's key, for the names that ``federation.toml`` has now."""
    certificate = renew_server(folder, federation, Authority.read(folder.authority))
    yield f"renewed the server until {certificate.not_valid_after_utc:%Y-%m-%d}: start superlink.sh and gateway.sh again"


def renew_due(folder: OperatorFolder, federation: Federation, within: timedelta) -> Iterator[str]:
    """Renew every certificate that ends within a time."""
    for holding in inventory(folder, federation):
        if holding.is_due(within) and holding.state == "server":
            yield from renew_servers(folder, federation)
        elif holding.is_due(within) and holding.state == "in":
            yield from renew_site(folder, federation, holding.name)
        elif holding.is_due(within) and holding.state == "authority":
            yield "the authority itself ends soon: a new federation with new kits is needed"


def _entry(federation: Federation, name: str) -> SiteEntry:
    for site in federation.sites:
        if site.name == name:
            return site
    known = ", ".join(site.name for site in federation.sites) or "none"
    raise ConfigError(explain("the request is of no site in the file", expected=known, found=name))


def _known(folder: OperatorFolder, node: PublicKey) -> str | None:
    for path in (*folder.sites.glob("*.pub"), *folder.revoked.glob("*.pub")):
        if read_public_line(path.read_text(), path) == node:
            return path.stem
    return None


def _pack_renewal(
    folder: OperatorFolder, authority: Authority, site: str, certificate: x509.Certificate, archive: Path
) -> None:
    with tempfile.TemporaryDirectory(dir=folder.kits) as temporary:
        content = Path(temporary) / site
        content.mkdir(mode=0o700)
        write_certificate(content / kit.CERTIFICATE, certificate)
        write_certificate(content / kit.CA, authority.certificate)
        kit.pack(content, archive)
