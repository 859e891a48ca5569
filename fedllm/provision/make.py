"""Make from ``federation.toml`` what is not there yet: authority, server, and a kit for every new site.

What is there is never made anew: a second call changes nothing, and a site added to the file gets its kit and nothing else
happens.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from cryptography import x509

from fedllm.errors import ConfigError, explain
from fedllm.files import atomic_write
from fedllm.provision import kit
from fedllm.provision.authority import Authority, read_certificate, write_certificate
from fedllm.provision.federation import Federation, SiteEntry
from fedllm.provision.folder import OperatorFolder
from fedllm.provision.keys import PublicKey, new_key, public_line, write_key, write_node_key
from fedllm.provision.server import lacking_names, make_server


def make(folder: OperatorFolder, federation: Federation) -> Iterator[str]:
    """Make what is missing and yield a line for everything that was done or should be known.

    Raises:
        ConfigError: The folder holds something that does not fit.
    """
    folder.make()
    authority, is_new = _authority(folder, federation)
    if is_new:
        yield f"made the authority of {federation.name}"
    yield from make_server(folder, federation, authority)
    if lacking := lacking_names(folder, federation):
        yield f"the server's certificate lacks {', '.join(lacking)}: fedllm provision renew --server"
    for site in federation.sites:
        yield from _site(folder, federation, authority, site)
    for name in sorted(set(folder.site_names()) - {site.name for site in federation.sites}):
        yield f"{name} is no longer in the file but still let in: fedllm provision revoke {name}"


def _authority(folder: OperatorFolder, federation: Federation) -> tuple[Authority, bool]:
    if (folder.authority / "ca.crt").exists():
        return Authority.read(folder.authority), False
    if any(folder.sites.iterdir()) or (folder.server / "server.crt").exists():
        fix = "Bring ca.key and ca.crt back; another authority would shut out every site."
        raise ConfigError(explain("the authority is not there, but what it signed is", where=folder.authority, fix=fix))
    authority = Authority.create(federation.name, federation.federation.authority_days)
    authority.write(folder.authority)
    return authority, True


def _site(folder: OperatorFolder, federation: Federation, authority: Authority, site: SiteEntry) -> Iterator[str]:
    if folder.is_in(site.name):
        return
    if folder.is_out(site.name):
        yield f"{site.name} is revoked and gets no kit; take it out of the file, or give it another name"
    elif site.own_keys:
        yield f"{site.name} makes its own keys: waiting for its request (fedllm provision sign)"
    else:
        _make_kit(folder, federation, authority, site)
        yield f"made kits/{site.name}.tar.gz"


def _make_kit(folder: OperatorFolder, federation: Federation, authority: Authority, site: SiteEntry) -> None:
    staged = staged_kit(folder, site.name)
    node, own = new_key(), new_key()
    write_node_key(staged / kit.NODE_KEY, node)
    write_key(staged / kit.CERTIFICATE_KEY, own)
    finish_kit(folder, federation, authority, site, staged, node.public_key(), own.public_key())


def staged_kit(folder: OperatorFolder, site: str) -> Path:
    """Return a new folder to build a kit in; what an interrupted command left is thrown away, as nobody has it yet."""
    staged = folder.kits / f".{site}.tmp"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(mode=0o700)
    return staged


def finish_kit(
    folder: OperatorFolder,
    federation: Federation,
    authority: Authority,
    site: SiteEntry,
    staged: Path,
    node: PublicKey,
    own: PublicKey,
) -> None:
    """Complete a staged kit, pack it, and let the site in, in this order.

    Args:
        folder: The operator's folder.
        federation: The federation.
        authority: Its authority.
        site: The site.
        staged: Where its kit is built; it may hold private keys already.
        node: Public key of the site's SuperNode.
        own: Public key of the site's certificate.
    """
    certificate = issue(folder, federation, authority, site.name, own)
    write_certificate(staged / kit.CERTIFICATE, certificate)
    write_certificate(staged / kit.CA, authority.certificate)
    line = public_line(node, site.name)
    atomic_write(staged / kit.NODE_PUBLIC, line)
    kit.write_kit_files(staged, federation, site)
    final = folder.kits / site.name
    shutil.rmtree(final, ignore_errors=True)
    staged.rename(final)
    kit.pack(final, folder.kits / f"{site.name}.tar.gz")
    write_certificate(folder.sites / f"{site.name}.crt", read_certificate(final / kit.CERTIFICATE))
    atomic_write(folder.sites / f"{site.name}.pub", line)


def issue(
    folder: OperatorFolder, federation: Federation, authority: Authority, site: str, public: PublicKey
) -> x509.Certificate:
    """Sign a site's certificate and put it on record first, so that whatever was handed out can be revoked."""
    certificate = authority.site_certificate(public, site, federation.federation.validity_days)
    record = folder.issued(site)
    record.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_certificate(record / f"{certificate.serial_number:x}.crt", certificate)
    return certificate
