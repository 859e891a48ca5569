"""A site's kit for tests of the doctor: certificates of every kind, a site's file, servers that answer HTTP."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from client_app.doctor.case import Case
from client_app.doctor.finding import Finding, Status
from client_app.site import load_site_config
from tests.wire_tools import Certificates

DAY = datetime.timedelta(days=1)


@dataclass
class Authority:
    """Signs certificates as a test wants them."""

    name: str
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def make(cls, name: str = "the federation", days: float = 365, *, is_authority: bool = True) -> Authority:
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(name, name, key, days)
        constraints = x509.BasicConstraints(ca=is_authority, path_length=None)
        return cls(name, key, builder.add_extension(constraints, critical=True).sign(key, hashes.SHA256()))

    def sign(self, name: str, days: float = 90, host: str = "127.0.0.1") -> tuple[bytes, bytes]:
        """Return a certificate for a host and its key, both in PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = [x509.IPAddress(ipaddress.ip_address(host)) if host[0].isdigit() else x509.DNSName(host)]
        builder = _builder(name, self.name, key, days)
        certificate = builder.add_extension(x509.SubjectAlternativeName(names), critical=False).sign(
            self.key, hashes.SHA256()
        )
        return _pem(certificate), private_pem(key)

    def pem(self) -> bytes:
        return _pem(self.certificate)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _builder(subject: str, issuer: str, key: ec.EllipticCurvePrivateKey, days: float) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    begins = now + min(0, days) * DAY - DAY  # a negative number of days ended that long ago
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(now + days * DAY)
    )


def make_kit(folder: Path, *, extra: str = "", source: str = "file:train.jsonl") -> Path:
    """Write a whole kit whose every part is right, and return the site's file."""
    authority = Authority.make()
    certificate, key = authority.sign("site a")
    (folder / "ca.crt").write_bytes(authority.pem())
    (folder / "site.crt").write_bytes(certificate)
    (folder / "site.key").write_bytes(key)
    (folder / "site.key").chmod(0o600)
    transport = '[transport]\nca = "ca.crt"\ncertificate = "site.crt"\nkey = "site.key"\n'
    path = folder / "site.toml"
    path.write_text(f'[site]\nname = "a"\n[data]\nsource = "{source}"\n{transport}{extra}')
    return path


def make_case(folder: Path, transport: str, server: str = "", **settings: object) -> Case:
    """Return a case of a site with these lines in its file's `[transport]`."""
    path = folder / "site.toml"
    path.write_text(f'[site]\nname = "a"\n[data]\nsource = "file:train.jsonl"\n[transport]\n{transport}\n')
    return Case(load_site_config(path), server=server, **settings)  # type: ignore[arg-type]


def by_check(findings: Iterator[Finding]) -> dict[str, Finding]:
    """Return the worst finding of each check."""
    found: dict[str, Finding] = {}
    order = list(Status)
    for finding in findings:
        worst = found.setdefault(finding.check, finding)
        if order.index(finding.status) > order.index(worst.status):
            found[finding.check] = finding
    return found


@dataclass
class Hub:
    """How a server that stands for gateway and SuperLink answers."""

    clock_s: float = 0.0
    health: int = 200
    fleet: int = 405
    control: int = 404


@contextlib.contextmanager
def serving_http(hub: Hub, certificates: Certificates | None = None) -> Iterator[int]:
    """Answer HTTP on loopback, with TLS if there are certificates, and yield the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = {"/health": hub.health, "/v1/fleet/pull-messages": hub.fleet, "/v1/control/start-run": hub.control}
            self.send_response(known.get(self.path, 404))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def date_time_string(self, timestamp: float | None = None) -> str:  # noqa: ARG002
            now = datetime.datetime.now(datetime.UTC).timestamp()
            return super().date_time_string(now + hub.clock_s)  # type: ignore[arg-type]

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            pass  # a client that refuses the certificate is what some tests are about

    server = Server(("127.0.0.1", 0), Handler)
    if certificates is not None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificates.certificate, certificates.key)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
