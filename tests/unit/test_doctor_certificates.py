"""What the doctor says of a kit's certificates."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from client_app.doctor.case import Case
from client_app.doctor.certificates import examine_certificates
from client_app.doctor.finding import Finding, Status, worst
from client_app.doctor.identity import examine_identity
from client_app.gate import check_certificates
from client_app.site import load_site_config
from fedllm.config import flatten, read_run_config
from fedllm.errors import ConfigError
from fedllm.messages import Hello
from fedllm.provision.keys import public_line, write_node_key
from tests.doctor_tools import Authority, by_check, make_case, make_kit, private_pem


def examined(site: Path) -> dict[str, Finding]:
    return by_check(examine_certificates(Case(load_site_config(site))))


def test_a_whole_kit_is_in_order(tmp_path: Path) -> None:
    found = examined(make_kit(tmp_path))
    assert worst(found.values()) is Status.OK
    assert set(found) == {"authority", "certificate", "chain", "key"}
    assert found["certificate"].facts["days_left"] == 89


def test_a_certificate_that_ended_or_soon_ends_is_named_with_its_date(tmp_path: Path) -> None:
    site, authority = make_kit(tmp_path), Authority.make()
    (tmp_path / "ca.crt").write_bytes(authority.pem())
    for days, status, words in [(-1, Status.FAILURE, "ended on"), (12, Status.WARNING, "ends in 11 days")]:
        certificate, key = authority.sign("site a", days)
        (tmp_path / "site.crt").write_bytes(certificate)
        (tmp_path / "site.key").write_bytes(key)
        finding = examined(site)["certificate"]
        assert finding.status is status
        assert words in finding.message
        assert "operator" in finding.fix


def test_an_authority_that_ended_fails_too(tmp_path: Path) -> None:
    site = make_kit(tmp_path)
    (tmp_path / "ca.crt").write_bytes(Authority.make(days=-2).pem())
    assert examined(site)["authority"].status is Status.FAILURE


def test_a_certificate_of_another_authority_fails_with_both_names(tmp_path: Path) -> None:
    site = make_kit(tmp_path)
    (tmp_path / "ca.crt").write_bytes(Authority.make("another federation").pem())
    finding = examined(site)["chain"]
    assert finding.status is Status.FAILURE
    assert "the federation" in finding.message
    assert "another federation" in finding.message


def test_an_authority_of_the_same_name_with_another_key_did_not_sign(tmp_path: Path) -> None:
    site = make_kit(tmp_path)
    (tmp_path / "ca.crt").write_bytes(Authority.make().pem())
    assert examined(site)["chain"].status is Status.FAILURE


def test_a_leaf_in_the_place_of_the_authority_fails(tmp_path: Path) -> None:
    site = make_kit(tmp_path)
    (tmp_path / "ca.crt").write_bytes(Authority.make(is_authority=False).pem())
    assert "no authority" in examined(site)["authority"].message


def test_a_key_of_another_certificate_fails(tmp_path: Path) -> None:
    site = make_kit(tmp_path)
    (tmp_path / "site.key").write_bytes(private_pem(ec.generate_private_key(ec.SECP256R1())))
    assert examined(site)["key"].status is Status.FAILURE


@pytest.mark.parametrize(("mode", "status"), [(0o600, "ok"), (0o640, "warning"), (0o604, "failure")])
def test_a_key_that_others_may_read_is_named(tmp_path: Path, mode: int, status: str) -> None:
    site = make_kit(tmp_path)
    (tmp_path / "site.key").chmod(mode)
    finding = examined(site)["key"]
    assert finding.status == status
    assert status == "ok" or finding.fix == f"chmod 600 {tmp_path / 'site.key'}"


@pytest.mark.parametrize("name", ["ca.crt", "site.crt", "site.key"])
@pytest.mark.parametrize("content", [None, b"", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_a_file_that_is_missing_or_broken_is_named(tmp_path: Path, name: str, content: bytes | None) -> None:
    site = make_kit(tmp_path)
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_bytes(content)
    failures = [finding for finding in examined(site).values() if finding.status is Status.FAILURE]
    assert any(name in finding.message for finding in failures)


def test_a_certificate_without_its_key_fails(tmp_path: Path) -> None:
    site = make_kit(tmp_path)
    site.write_text(site.read_text().replace('key = "site.key"\n', ""))
    assert "transport.key is missing" in examined(site)["key"].message


def test_a_nodes_key_is_looked_at_where_the_site_has_a_kit(tmp_path: Path) -> None:
    case = Case(load_site_config(make_kit(tmp_path)))
    assert not list(examine_identity(case))
    (tmp_path / "kit.toml").write_text('federation = "f"\nsite = "a"\nserver = "127.0.0.1:443"\n')
    (missing,) = examine_identity(case)
    assert missing.status is Status.FAILURE
    keys = [ec.generate_private_key(ec.SECP384R1()) for _ in range(2)]
    write_node_key(tmp_path / "node.key", keys[0])
    for key, status in zip(keys, (Status.OK, Status.FAILURE), strict=True):
        (tmp_path / "node.pub").write_text(public_line(key.public_key(), "a"))
        assert worst(examine_identity(case)) is status
    (tmp_path / "node.key").write_text("no key")
    assert worst(examine_identity(case)) is Status.FAILURE


def test_plaintext_is_warned_of(tmp_path: Path) -> None:
    (finding,) = examine_certificates(make_case(tmp_path, "insecure = true"))
    assert finding.status is Status.WARNING


def test_a_certificate_that_does_not_hold_is_said_before_a_run_needs_it(tmp_path: Path) -> None:
    owner = load_site_config(make_kit(tmp_path))
    asked = [
        Hello(run="r", run_folder="", config=flatten(read_run_config({"transport.kind": kind})))
        for kind in ("grpc", "flower")
    ]
    for instruction in asked:
        check_certificates(owner, instruction)
    certificate, key = Authority.make("another federation").sign("site a", -1)
    (tmp_path / "site.crt").write_bytes(certificate)
    (tmp_path / "site.key").write_bytes(key)
    with pytest.raises(ConfigError, match=r"certificate ended on .* UTC; .*another federation.*site\.crt.*operator"):
        check_certificates(owner, asked[0])
    check_certificates(owner, asked[1])  # where updates ride in Flower's messages nobody asks for a certificate
