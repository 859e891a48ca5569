"""The certificates of the site's kit: whole, signed by the federation's authority, not about to end, for no one else."""

from __future__ import annotations

import datetime
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from client_app.doctor.case import Case
from client_app.doctor.finding import Fact, Finding, Status, failure, ok, warning

SOON = datetime.timedelta(days=30)
"""Time before a certificate's end from which on there is a warning."""

NEW_KIT = "Ask the operator for a new kit."

Chain = list[x509.Certificate]


def examine_certificates(case: Case) -> Iterator[Finding]:
    """Look at the files that the site's file names."""
    section = case.owner.transport
    if section.insecure:
        fix = "Remove transport.insecure unless nobody else can reach this network."
        yield warning("certificates", "the update stream goes unencrypted", fix)
        return
    authorities, problems = _load("authority", section.ca)
    yield from problems
    if section.ca is None:
        yield ok("authority", "none named; those of the system are trusted")
    for authority in authorities:
        yield examine_authority(authority)
    chain, problems = _load("certificate", section.certificate)
    yield from problems
    if chain:
        yield validity("certificate", chain[0], "the site's certificate")
    if chain and authorities:
        yield examine_chain(chain, authorities)
    yield from _examine_key(section.key, chain, is_needed=section.certificate is not None)


def broken_certificates(case: Case) -> list[str]:
    """Return what keeps the gateway and this site from taking each other for members of one federation."""
    about = ("authority", "certificate", "chain")
    found = examine_certificates(case)
    return [one.message for one in found if one.status is Status.FAILURE and one.check in about]


def examine_authority(certificate: x509.Certificate) -> Finding:
    """Look at a certificate that is to be trusted."""
    if not _is_authority(certificate):
        return failure("authority", f"{_name(certificate.subject)} is the certificate of no authority", NEW_KIT)
    return validity("authority", certificate, _name(certificate.subject))


def validity(check: str, certificate: x509.Certificate, name: str, now: datetime.datetime | None = None) -> Finding:
    """Say whether a certificate holds now, and how long it still will.

    Args:
        check: Name of the check.
        certificate: The certificate.
        name: What to call it.
        now: The time, None for this machine's clock.
    """
    now = now or datetime.datetime.now(datetime.UTC)
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    days = (ends - now) // datetime.timedelta(days=1)
    facts: dict[str, Fact] = {"ends": ends.isoformat(), "days_left": days}
    if now < begins:
        fix = "Set this machine's clock right; if it is right, ask the operator."
        return failure(check, f"{name} holds only from {begins:%Y-%m-%d %H:%M} UTC on", fix, **facts)
    if now >= ends:
        return failure(check, f"{name} ended on {ends:%Y-%m-%d %H:%M} UTC", NEW_KIT, **facts)
    if ends - now < SOON:
        left = f"{days} days" if days > 1 else f"{(ends - now) // datetime.timedelta(hours=1)} hours"
        return warning(check, f"{name} ends in {left}, on {ends:%Y-%m-%d}", NEW_KIT, **facts)
    return ok(check, f"{name} holds until {ends:%Y-%m-%d}", **facts)


def examine_chain(chain: Chain, authorities: Chain) -> Finding:
    """Follow the signatures from a certificate through its file to an authority."""
    current, others = chain[0], chain[1:]
    for _ in range(len(chain)):
        if any(_signed_by(current, authority) for authority in authorities):
            return ok("chain", f"signed by the federation's authority ({_name(authorities[0].subject)})")
        following = next((other for other in others if _signed_by(current, other)), None)
        if following is None:
            break
        current = following
    found = f"the site's certificate is signed by {_name(current.issuer)}"
    return failure("chain", f"{found}, not by the authority of transport.ca ({_name(authorities[0].subject)})", NEW_KIT)


def examine_mode(check: str, path: Path, mode: int) -> Finding:
    """Say who else may read a secret file, by its permission bits."""
    fix = f"chmod 600 {path}"
    if mode & stat.S_IRWXO:
        return failure(check, f"everybody on this machine may use {path.name} (mode {mode:o})", fix)
    if mode & stat.S_IRWXG:
        return warning(check, f"its group may use {path.name} (mode {mode:o})", fix)
    return ok(check, f"only its owner may use {path.name}")


def _load(check: str, path: Path | None) -> tuple[Chain, list[Finding]]:
    """Return a file's certificates, and what is wrong with it."""
    if path is None:
        return [], []
    try:
        return x509.load_pem_x509_certificates(path.read_bytes()), []
    except OSError as error:
        return [], [_unreadable(check, path, error)]
    except ValueError:
        return [], [failure(check, f"{path} holds no certificate in PEM", NEW_KIT)]


def _examine_key(path: Path | None, chain: Chain, *, is_needed: bool) -> Iterator[Finding]:
    if (path is not None) != is_needed:
        missing = "transport.key" if is_needed else "transport.certificate"
        message = f"a certificate and its key belong together; {missing} is missing"
        yield failure("key", message, "Name both in the site's file, or none.")
    if path is None:
        return
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
        yield examine_mode("key", path, stat.S_IMODE(path.stat().st_mode))
    except OSError as error:
        yield _unreadable("key", path, error)
        return
    except (ValueError, TypeError, UnsupportedAlgorithm):
        yield failure("key", f"{path} holds no private key in PEM without a password", NEW_KIT)
        return
    if chain and _public(key.public_key()) == _public(chain[0].public_key()):
        yield ok("key", f"{path.name} belongs to the certificate")
    elif chain:
        yield failure("key", f"{path.name} is not the key of the site's certificate", NEW_KIT)


def _unreadable(check: str, path: Path, error: OSError) -> Finding:
    return failure(check, f"{path} cannot be read: {error.strerror}", "Correct its path in the site's file.")


def _public(key: Any) -> bytes:
    return bytes(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return bool(certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca)
    except x509.ExtensionNotFound:
        return False


def _signed_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _name(name: x509.Name) -> str:
    return name.rfc4514_string() or "a name without parts"
