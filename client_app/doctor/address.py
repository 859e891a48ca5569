"""An address that sites connect to: can it be reached, and does the certificate there fit."""

from __future__ import annotations

import socket
import ssl
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

from cryptography import x509

from client_app.doctor.certificates import validity
from client_app.doctor.finding import Finding, failure, ok, warning
from fedllm.errors import ConfigError, explain
from fedllm.wire.tls import TlsConfig

TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Address:
    """Where a service is.

    Attributes:
        host: A name or an IP address.
        port: Its port.
    """

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read ``host:port``; an IPv6 address stands in brackets.

        Raises:
            ConfigError: The text is something else.
        """
        host, _, port = text.rpartition(":")
        if not host.strip("[]") or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
            raise ConfigError(
                explain(
                    "an address cannot be read", expected="host:port, such as hub.example.org:443", found=repr(text)
                )
            )
        return cls(host.strip("[]"), int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def examine_address(check: str, address: Address, tls: TlsConfig | None) -> Iterator[Finding]:
    """Connect to an address and, with TLS, verify who answers.

    Args:
        check: Name of the check.
        address: Where.
        tls: The site's certificates, None for plaintext.
    """
    if proxy := _proxy(address, "http" if tls is None else "https"):
        fix = "If the site cannot join, have the proxy let it through, or add the host to NO_PROXY."
        yield warning(check, f"{address} is reached through the proxy {proxy}; its certificate is not looked at", fix)
        return
    try:
        with socket.create_connection((address.host, address.port), TIMEOUT_S) as connection:
            yield (
                ok(check, f"{address} can be reached") if tls is None else _shake_hands(check, connection, address, tls)
            )
    except OSError as error:
        yield _unreachable(check, address, error)


def context_for(tls: TlsConfig) -> ssl.SSLContext:
    """Return Python's form of the site's certificates."""
    context = ssl.create_default_context(cafile=tls.ca)
    if tls.certificate and tls.key:
        context.load_cert_chain(tls.certificate, tls.key)
    return context


def _proxy(address: Address, scheme: str) -> str | None:
    if urllib.request.proxy_bypass(str(address)):
        return None
    return urllib.request.getproxies().get(scheme)


def _unreachable(check: str, address: Address, error: OSError) -> Finding:
    match error:
        case socket.gaierror():
            return failure(
                check, f"the name {address.host!r} is not known here", "Check the name, and this site's DNS."
            )
        case ConnectionRefusedError():
            fix = "Check the port, and ask the operator whether the gateway runs."
            return failure(check, f"nobody listens at {address}", fix)
        case TimeoutError():
            fix = f"Have the firewall allow outgoing TCP connections to {address}."
            return failure(check, f"no answer from {address} within {TIMEOUT_S:g} s", fix)
    return failure(check, f"{address} cannot be reached: {error.strerror or error}", "Check the network.")


def _shake_hands(check: str, connection: socket.socket, address: Address, tls: TlsConfig) -> Finding:
    try:
        context = context_for(tls)
    except (OSError, ssl.SSLError) as error:
        return failure(check, f"the kit's certificates cannot be used: {error}", "See the lines on certificates.")
    try:
        with context.wrap_socket(connection, server_hostname=address.host) as secure:
            certificate = x509.load_der_x509_certificate(secure.getpeercert(binary_form=True) or b"")
    except ssl.SSLCertVerificationError as error:
        names = ", ".join(_names_at(address)) or "unknown"
        fix = "Connect by a name of the certificate, and use the federation's own authority as transport.ca."
        message = f"the certificate at {address} does not fit: {error.verify_message}; it is for {names}"
        return failure(check, message, fix)
    except ssl.SSLError as error:
        fix = "Check that the port is the gateway's, and that nothing between reads TLS."
        return failure(check, f"TLS with {address} failed: {error.reason or error}", fix)
    return validity(check, certificate, f"{address} can be reached; its certificate")


def _names_at(address: Address) -> list[str]:
    """Return the names in the certificate of whoever answers, unverified."""
    try:
        certificate = x509.load_pem_x509_certificate(
            ssl.get_server_certificate((address.host, address.port), timeout=TIMEOUT_S).encode()
        )
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, x509.ExtensionNotFound):
        return []
    return [str(name.value) for name in names]
