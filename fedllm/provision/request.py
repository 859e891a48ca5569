"""Private keys that never leave the site: it makes them itself and sends a request, which the operator signs.

A request is JSON: ``format`` (1), ``site``, ``node_key`` (public, a line of OpenSSH), ``certificate_request`` (PKCS #10 in
PEM, signed with the key of the site's certificate) and ``signature`` (base64; ECDSA with SHA-384 by the node key over all
of it). So both keys are shown to be the sender's, and nothing can be changed or put together anew on its way. Who the
sender is, no signature can say: operator and site compare the request's fingerprint over another channel, such as the
telephone.

Evolution: another format gets another number, and is refused by what does not know it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding, load_ssh_private_key
from cryptography.x509.oid import NameOID
from pydantic import Field, ValidationError

from fedllm.errors import ConfigError, explain
from fedllm.files import atomic_write
from fedllm.model.spec import Section
from fedllm.provision.federation import SITE_NAME
from fedllm.provision.keys import (
    PrivateKey,
    PublicKey,
    new_key,
    public_line,
    read_key,
    read_public_line,
    write_key,
    write_node_key,
)
from fedllm.provision.kit import CERTIFICATE_KEY, NODE_KEY

REQUEST = "request.json"
_MAX_BYTES = 1 << 16
_SIGNED = ec.ECDSA(SHA384())


class SiteRequest(Section):
    """What a site sends to the operator; nothing in it is secret."""

    format: Literal[1] = 1
    site: str = Field(pattern=SITE_NAME)
    node_key: str
    certificate_request: str
    signature: str = ""

    @property
    def fingerprint(self) -> str:
        """Return the request's fingerprint, for two people to compare."""
        digest = hashlib.sha256(self.signed_bytes()).hexdigest()[:32]
        return " ".join(re.findall("....", digest))

    def signed_bytes(self) -> bytes:
        """Return what the node key signs."""
        parts = (str(self.format), self.site, self.node_key, self.certificate_request)
        return b"fedllm site request\0" + b"\0".join(part.encode() for part in parts)

    def public_keys(self) -> tuple[PublicKey, PublicKey]:
        """Return the public keys of the SuperNode and of the certificate.

        Raises:
            ConfigError: The request was changed, or was not made with the keys that it names.
        """
        node = read_public_line(self.node_key, f"the request of {self.site}")
        try:
            node.verify(base64.b64decode(self.signature, validate=True), self.signed_bytes(), _SIGNED)
        except (InvalidSignature, binascii.Error) as error:
            raise self._refused("it was changed, or not signed with its node key") from error
        try:
            request = x509.load_pem_x509_csr(self.certificate_request.encode())
        except ValueError as error:
            raise self._refused("its certificate request is none") from error
        own = request.public_key()
        names = [name.value for name in request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        if not request.is_signature_valid or names != [self.site]:
            raise self._refused("its certificate request is for another site, or not signed with its own key")
        if not isinstance(own, ec.EllipticCurvePublicKey) or not isinstance(own.curve, ec.SECP384R1) or own == node:
            raise self._refused("its certificate needs a key of its own on P-384")
        return node, own

    def _refused(self, why: str) -> ConfigError:
        fix = "Let the site make and send it again: fedllm provision request."
        return ConfigError(explain("the request is refused", found=why, where=f"the request of {self.site}", fix=fix))


def make_request(folder: Path, site: str) -> SiteRequest:
    """Make a site's private keys and its request; a second call returns the same.

    Args:
        folder: The site's folder, which its kit is unpacked over later.
        site: The site's name as the operator knows it.

    Raises:
        ConfigError: The name cannot be a site's, or the folder holds a request of another.
    """
    if not re.fullmatch(SITE_NAME, site):
        raise ConfigError(explain("this cannot be a site's name", expected=SITE_NAME, found=repr(site)))
    if (folder / REQUEST).exists():
        request = read_request(folder / REQUEST)
        if request.site != site:
            raise ConfigError(explain("this folder holds another site's request", found=request.site, where=folder))
        return request
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.chmod(folder, 0o700)
    request = _signed(site, _node_key(folder), _certificate_key(folder))
    atomic_write(folder / REQUEST, request.model_dump_json(indent=2) + "\n")
    return request


def read_request(path: Path) -> SiteRequest:
    """Read a request.

    Raises:
        ConfigError: It cannot be read, or is none.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ConfigError(
                explain("this is too long for a request", expected=f"at most {_MAX_BYTES} bytes", where=path)
            )
        return SiteRequest.model_validate_json(content)
    except OSError as error:
        raise ConfigError(explain("the request cannot be read", found=error.strerror, where=path)) from error
    except ValidationError as error:
        raise ConfigError(explain("this is not a site's request", expected="JSON of format 1", where=path)) from error


def _signed(site: str, node: PrivateKey, own: PrivateKey) -> SiteRequest:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, site)])
    wanted = x509.CertificateSigningRequestBuilder().subject_name(name).sign(own, SHA384())
    node_key = public_line(node.public_key(), site).strip()
    request = SiteRequest(site=site, node_key=node_key, certificate_request=wanted.public_bytes(Encoding.PEM).decode())
    signature = base64.b64encode(node.sign(request.signed_bytes(), _SIGNED)).decode()
    return request.model_copy(update={"signature": signature})


def _node_key(folder: Path) -> PrivateKey:
    path = folder / NODE_KEY
    if not path.exists():
        write_node_key(path, new_key())
    key = load_ssh_private_key(path.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def _certificate_key(folder: Path) -> PrivateKey:
    path = folder / CERTIFICATE_KEY
    if not path.exists():
        write_key(path, new_key())
    return read_key(path)
