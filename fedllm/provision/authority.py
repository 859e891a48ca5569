"""The federation's authority: it signs the server's certificate and the sites', and says which sites are out.

One level, no intermediate: sites trust ``ca.crt`` and nothing else, and the authority signs nothing but end certificates
(path length 0). Its private key is needed only while ``fedllm provision`` works and is best kept off the server.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedllm.errors import ConfigError, explain
from fedllm.files import atomic_write
from fedllm.provision.federation import is_address
from fedllm.provision.keys import PrivateKey, PublicKey, new_key, read_key, write_key

_SLACK = timedelta(hours=1)  # a peer whose clock is behind takes a new certificate at once


@dataclass(frozen=True)
class Authority:
    """The authority with its private key at hand.

    Attributes:
        certificate: Its own certificate, which signs itself.
        key: Its private key.
    """

    certificate: x509.Certificate
    key: PrivateKey

    @classmethod
    def create(cls, federation: str, days: int) -> Authority:
        """Make an authority for a federation."""
        key, name = new_key(), _name(federation, "authority")
        builder = _builder(name, name, key.public_key(), _now() + timedelta(days=days))
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
        return cls(builder.sign(key, SHA384()), key)

    @classmethod
    def read(cls, folder: Path) -> Authority:
        """Read an authority from its folder.

        Raises:
            ConfigError: A file is missing or broken, or key and certificate do not belong together.
        """
        certificate, key = read_certificate(folder / "ca.crt"), read_key(folder / "ca.key")
        if certificate.public_key() != key.public_key():
            raise ConfigError(explain("the authority's key and certificate do not belong together", where=folder))
        return cls(certificate, key)

    def write(self, folder: Path) -> None:
        """Write key and certificate; the certificate last, since an authority is there when it is."""
        write_key(folder / "ca.key", self.key)
        write_certificate(folder / "ca.crt", self.certificate)

    def server_certificate(self, public: PublicKey, names: Sequence[str], days: int) -> x509.Certificate:
        """Sign a certificate for the server.

        Args:
            public: The server's public key.
            names: DNS names and IP addresses; the first is the subject.
            days: How long it holds, at most as long as the authority's.
        """
        return self._sign(names[0], public, days, list(map(_general_name, names)), ExtendedKeyUsageOID.SERVER_AUTH)

    def site_certificate(self, public: PublicKey, site: str, days: int) -> x509.Certificate:
        """Sign a certificate with which a site shows who it is."""
        name = x509.UniformResourceIdentifier(f"urn:fedllm:{self._federation}:{site}")
        return self._sign(site, public, days, [name], ExtendedKeyUsageOID.CLIENT_AUTH)

    def revocations(self, revoked: Iterable[x509.Certificate]) -> x509.CertificateRevocationList:
        """Sign the list of certificates that hold no longer.

        The list itself holds as long as the authority: a gateway refuses every site once its list is out of date, and an
        operator replaces it only when a site goes.
        """
        now = _now()
        builder = x509.CertificateRevocationListBuilder(
            self.certificate.subject, now, self.certificate.not_valid_after_utc
        )
        for certificate in revoked:
            entry = x509.RevokedCertificateBuilder(certificate.serial_number, now).build()
            builder = builder.add_revoked_certificate(entry)
        identifier = _issuer_identifier(self.certificate)
        number = x509.CRLNumber(int(now.timestamp()))
        return (
            builder.add_extension(identifier, critical=False)
            .add_extension(number, critical=False)
            .sign(self.key, SHA384())
        )

    @property
    def _federation(self) -> str:
        return str(self.certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)[0].value)

    def _sign(
        self, subject: str, public: PublicKey, days: int, names: list[x509.GeneralName], use: x509.ObjectIdentifier
    ) -> x509.Certificate:
        end = min(_now() + timedelta(days=days), self.certificate.not_valid_after_utc)
        builder = _builder(_name(self._federation, subject), self.certificate.subject, public, end)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage([use]), critical=False)
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        builder = builder.add_extension(_issuer_identifier(self.certificate), critical=False)
        return builder.sign(self.key, SHA384())


def write_certificate(path: Path, certificate: x509.Certificate) -> None:
    """Write a certificate in PEM."""
    atomic_write(path, certificate.public_bytes(Encoding.PEM))


def read_certificate(path: Path) -> x509.Certificate:
    """Read a certificate in PEM.

    Raises:
        ConfigError: It is missing or none.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise ConfigError(explain("a certificate cannot be read", found=error.strerror, where=path)) from error
    except ValueError as error:
        raise ConfigError(explain("this is not a certificate in PEM", where=path)) from error


def _builder(subject: x509.Name, issuer: x509.Name, public: PublicKey, end: datetime) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder(issuer, subject, public, x509.random_serial_number())
    builder = builder.not_valid_before(_now() - _SLACK).not_valid_after(end)
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)


def _name(federation: str, common: str) -> x509.Name:
    attributes = ((NameOID.ORGANIZATION_NAME, federation), (NameOID.COMMON_NAME, common))
    return x509.Name([x509.NameAttribute(kind, value) for kind, value in attributes])


def _general_name(name: str) -> x509.GeneralName:
    return x509.IPAddress(ipaddress.ip_address(name)) if is_address(name) else x509.DNSName(name)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _issuer_identifier(issuer: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    own = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own)


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)
