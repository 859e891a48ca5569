"""The server's folder: certificate, secrets, and the scripts that start Flower and the gateway with them."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from fedllm.files import atomic_write
from fedllm.provision.authority import Authority, read_certificate, write_certificate
from fedllm.provision.federation import Federation
from fedllm.provision.folder import OperatorFolder
from fedllm.provision.keys import new_key, read_key, write_key, write_secret
from fedllm.provision.templates import filled, read_template

SECRET_BYTES = 32
_ASKS = "site-certificates.conf"
_SCRIPTS = ("superlink.sh", "superexec.sh", "gateway.sh", "register.sh")
_UNITS = ("fedllm-superlink.service", "fedllm-superexec.service", "fedllm-gateway.service")


def make_server(folder: OperatorFolder, federation: Federation, authority: Authority) -> Iterator[str]:
    """Make what the server lacks, bring what follows from ``federation.toml`` up to date, and yield what was done."""
    server = folder.server
    if not (server / "superexec.secret").exists():
        write_secret(server / "superexec.secret", secrets.token_bytes(SECRET_BYTES))
    if not (server / "server.key").exists():
        write_key(server / "server.key", new_key())
    if not (server / "server.crt").exists():
        renew_server(folder, federation, authority)
        yield f"made the server's certificate for {', '.join(federation.server.all_names)}"
    if not (server / "revoked.pem").exists():
        write_revocations(folder, authority)
    if not federation.server.site_certificates and (server / _ASKS).exists():
        (server / _ASKS).unlink()
        yield f"removed server/{_ASKS}"
    for name, (text, mode) in _texts(folder, federation):
        if not (server / name).exists() or (server / name).read_text() != text:
            atomic_write(server / name, text, mode=mode)
            yield f"wrote server/{name}"


def renew_server(folder: OperatorFolder, federation: Federation, authority: Authority) -> x509.Certificate:
    """Sign a new certificate for the server's key."""
    public = read_key(folder.server / "server.key").public_key()
    days = federation.federation.validity_days
    certificate = authority.server_certificate(public, federation.server.all_names, days)
    write_certificate(folder.server / "server.crt", certificate)
    return certificate


def write_revocations(folder: OperatorFolder, authority: Authority) -> None:
    """Write the list that the gateway reads: all certificates ever issued to sites that are out."""
    names = sorted(path.stem for path in folder.revoked.glob("*.pub"))
    revoked = [read_certificate(path) for name in names for path in sorted(folder.issued(name).glob("*.crt"))]
    atomic_write(folder.server / "revoked.pem", authority.revocations(revoked).public_bytes(Encoding.PEM))


def lacking_names(folder: OperatorFolder, federation: Federation) -> list[str]:
    """Return names of ``federation.toml`` that the server's certificate is not valid for."""
    extensions = read_certificate(folder.server / "server.crt").extensions
    names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    held = {str(name.value) for name in names}
    return [name for name in federation.server.all_names if name not in held]


def _texts(folder: OperatorFolder, federation: Federation) -> Iterator[tuple[str, tuple[str, int]]]:
    values = {
        "FEDERATION": federation.name,
        "PORT": federation.server.port,
        "SUPERLINK_PORT": federation.server.superlink_port,
        "SERVER": federation.server.address,
        "HERE": folder.server,
    }
    for name in _SCRIPTS:
        yield name, (filled(f"server/{name}", values), 0o700)
    for name in _UNITS:
        yield f"systemd/{name}", (filled(f"systemd/{name}", values), 0o600)
    yield "README.md", (filled("server/README.md", values), 0o600)
    yield "flwr/config.toml", (filled("server/config.toml", values), 0o600)
    yield "ca.crt", ((folder.authority / "ca.crt").read_text(), 0o644)
    yield "nginx.conf", (_gateway(federation), 0o600)
    if federation.server.site_certificates:
        yield _ASKS, (read_template(f"gateway/{_ASKS}"), 0o600)


def _gateway(federation: Federation) -> str:
    """Fill in the gateway's template; nginx takes the names of files from the folder of its configuration."""
    values = {
        "GATEWAY_PORT": federation.server.port,
        "GATEWAY_CERTIFICATE": "server.crt",
        "GATEWAY_KEY": "server.key",
        "AUTHORITY": "ca.crt",
        "SUPERLINK": f"https://127.0.0.1:{federation.server.superlink_port}",
        "SUPERLINK_NAME": "localhost",
        "UPDATES_HOST": "127.0.0.1",
        "RESOLVER": "127.0.0.1",
    }
    template = read_template("gateway/nginx.conf")
    return re.sub(r"\$\{(\w+)\}", lambda place: str(values[place[1]]), template)
