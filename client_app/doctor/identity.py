"""The key by which the server knows this site's SuperNode."""

from __future__ import annotations

import stat
from collections.abc import Iterator

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_private_key

from client_app.doctor.case import Case
from client_app.doctor.certificates import NEW_KIT, examine_mode
from client_app.doctor.finding import Finding, failure, ok
from fedllm.provision.kit import KIT, NODE_KEY, NODE_PUBLIC

CHECK = "node key"


def examine_identity(case: Case) -> Iterator[Finding]:
    """Look at the SuperNode's key beside the site's file; nothing where that lies in no kit."""
    folder = case.owner.home
    if not (folder / KIT).is_file():
        return
    try:
        key = load_ssh_private_key((folder / NODE_KEY).read_bytes(), password=None)
    except OSError as error:
        yield failure(CHECK, f"{folder / NODE_KEY} cannot be read: {error.strerror}", NEW_KIT)
        return
    except (ValueError, TypeError, UnsupportedAlgorithm):
        yield failure(CHECK, f"{folder / NODE_KEY} holds no private key of OpenSSH's without a passphrase", NEW_KIT)
        return
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        yield failure(CHECK, f"{NODE_KEY} is no elliptic-curve key, which Flower wants", NEW_KIT)
        return
    yield examine_mode(CHECK, folder / NODE_KEY, stat.S_IMODE((folder / NODE_KEY).stat().st_mode))
    yield from _compare(case, key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))


def _compare(case: Case, public: bytes) -> Iterator[Finding]:
    path = case.owner.home / NODE_PUBLIC
    if not path.is_file():
        return
    if path.read_bytes().split()[:2] == public.split()[:2]:
        yield ok(CHECK, f"{NODE_KEY} and {NODE_PUBLIC} belong together")
    else:
        yield failure(CHECK, f"{NODE_PUBLIC} is not the public half of {NODE_KEY}", NEW_KIT)
