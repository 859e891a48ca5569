"""Certificates of the update stream, and the one place where plaintext is allowed or refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc

from fedllm.errors import ConfigError, explain


@dataclass(frozen=True)
class TlsConfig:
    """Files in PEM, as one end needs them.

    Attributes:
        ca: Authority of the federation, which signed the peer's certificate. None at a site takes the system's
            authorities, at the server asks sites for no certificate.
        certificate: This end's own chain; the server must have one, a site only if the server asks for it.
        key: The private key that belongs to it.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None


def server_credentials(tls: TlsConfig | None, *, insecure: bool) -> grpc.ServerCredentials | None:
    """Return credentials to listen with, or None for plaintext.

    Raises:
        ConfigError: Neither TLS nor ``insecure`` is set, both are, or a file cannot be read.
    """
    if _is_plaintext(tls, insecure, "update server"):
        return None
    assert tls is not None
    if tls.certificate is None or tls.key is None:
        raise ConfigError(explain("the update server has no certificate", expected="a certificate and its key"))
    pair = (_read(tls.key), _read(tls.certificate))
    root = _read(tls.ca) if tls.ca is not None else None
    return grpc.ssl_server_credentials([pair], root, require_client_auth=root is not None)


def channel_credentials(tls: TlsConfig | None, *, insecure: bool) -> grpc.ChannelCredentials | None:
    """Return credentials to connect with, or None for plaintext.

    Raises:
        ConfigError: As for :func:`server_credentials`.
    """
    if _is_plaintext(tls, insecure, "update client"):
        return None
    assert tls is not None
    root, key, certificate = (_read(path) if path is not None else None for path in (tls.ca, tls.key, tls.certificate))
    return grpc.ssl_channel_credentials(root, key, certificate)


def _is_plaintext(tls: TlsConfig | None, insecure: bool, where: str) -> bool:
    if (tls is None) == insecure:
        return insecure
    if tls is None:
        fix = "Name the federation's certificates, or set insecure explicitly for a closed network."
        raise ConfigError(explain("no TLS is configured", where=where, fix=fix))
    raise ConfigError(explain("TLS and insecure are both set", where=where, fix="Remove one of them."))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(explain("a certificate or key cannot be read", found=error.strerror, where=path)) from error
