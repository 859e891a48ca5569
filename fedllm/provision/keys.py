"""Private keys: made, written for their owner alone, and never shown.

All are on the curve P-384, which Flower takes for SuperNodes and every TLS library for certificates. A SuperNode's key is
in OpenSSH's format, as Flower reads it; the others are PKCS #8 in PEM. None has a passphrase, since services start without
a person.
"""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_public_key,
)

from fedllm.errors import ConfigError, explain
from fedllm.files import atomic_write

PrivateKey = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey
SECRET_MODE = 0o600


def new_key() -> PrivateKey:
    """Make a private key from the operating system's generator."""
    return ec.generate_private_key(ec.SECP384R1())


def write_key(path: Path, key: PrivateKey) -> None:
    """Write a private key in PEM."""
    _write(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def write_node_key(path: Path, key: PrivateKey) -> None:
    """Write a SuperNode's private key in OpenSSH's format."""
    _write(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))


def write_secret(path: Path, secret: bytes) -> None:
    """Write a shared secret."""
    _write(path, secret)


def read_key(path: Path) -> PrivateKey:
    """Read a private key in PEM.

    Raises:
        ConfigError: It cannot be read or is no key on P-384. The message does not show it.
    """
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except OSError as error:
        raise ConfigError(explain("a private key cannot be read", found=error.strerror, where=path)) from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(explain("this is not a private key in PEM", where=path)) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(explain("this key is not on an elliptic curve", found=type(key).__name__, where=path))
    return key


def public_line(key: PublicKey, comment: str) -> str:
    """Return a public key as OpenSSH writes it, one line with a comment, such as ``flwr supernode register`` reads."""
    return f"{key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()} {comment}\n"


def read_public_line(line: str, where: object) -> PublicKey:
    """Read a public key as OpenSSH writes it.

    Raises:
        ConfigError: It is none, or not on P-384.
    """
    try:
        key = load_ssh_public_key(line.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(explain("this is not a public key in OpenSSH's format", where=where)) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ConfigError(explain("this public key is of another kind", expected="ecdsa-sha2-nistp384", where=where))
    return key


def _write(path: Path, content: bytes) -> None:
    atomic_write(path, content, mode=SECRET_MODE)
