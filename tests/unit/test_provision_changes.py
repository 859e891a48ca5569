"""Keys made at the site, revocation and renewal: X.509 verification, and requests that were tampered with."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key, load_ssh_public_key
from cryptography.x509.verification import PolicyBuilder, Store

from fedllm.cli.main import main
from fedllm.errors import ConfigError
from fedllm.provision.authority import Authority, write_certificate
from fedllm.provision.request import make_request, read_request

FEDERATION = """
[federation]
name = "lung-study"

[server]
host = "fl.example.org"

[[sites]]
name = "hospital-a"

[[sites]]
name = "hospital-b"
own_keys = true
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "federation.toml").write_text(FEDERATION)
    monkeypatch.chdir(tmp_path)
    assert main(["provision", "federation.toml"]) == 0
    return tmp_path / "lung-study"


def _request(where: Path) -> Path:
    assert main(["provision", "request", "--name", "hospital-b", "--into", str(where)]) == 0
    return where / "request.json"


def _certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def _revoked(folder: Path) -> set[int]:
    revocations = x509.load_pem_x509_crl((folder / "server" / "revoked.pem").read_bytes())
    authority = _certificate(folder / "authority" / "ca.crt").public_key()
    assert revocations.is_signature_valid(authority)  # type: ignore[arg-type]
    return {entry.serial_number for entry in revocations}


def test_a_site_that_makes_its_own_keys_gets_a_kit_that_fits_them_and_holds_none(folder: Path, tmp_path: Path):
    own = tmp_path / "at-the-site" / "hospital-b"
    request = _request(own)
    assert not (folder / "kits" / "hospital-b").exists(), "no kit before the request"
    assert main(["provision", "sign", str(request)]) == 0
    with tarfile.open(folder / "kits" / "hospital-b.tar.gz") as tar:
        assert not [name for name in tar.getnames() if name.endswith(".key")]
    assert not [path for path in folder.rglob("*.key") if "hospital-b" in str(path)]
    shutil.unpack_archive(folder / "kits" / "hospital-b.tar.gz", own.parent, filter="data")
    leaf = _certificate(own / "site.crt")
    PolicyBuilder().store(Store([_certificate(own / "ca.crt")])).build_client_verifier().verify(leaf, [])
    assert load_pem_private_key((own / "site.key").read_bytes(), None).public_key() == leaf.public_key()
    node = load_ssh_private_key((own / "node.key").read_bytes(), None).public_key()
    public = (folder / "server" / "sites" / "hospital-b.pub").read_text()
    assert load_ssh_public_key(public.encode()) == node
    assert public == (own / "node.pub").read_text()


def test_private_keys_stay_at_the_site_for_its_owner_alone(folder: Path, tmp_path: Path):
    request = _request(tmp_path / "own")
    assert "PRIVATE" not in request.read_text()
    assert (tmp_path / "own").stat().st_mode & 0o777 == 0o700
    assert {(tmp_path / "own" / name).stat().st_mode & 0o777 for name in ("node.key", "site.key")} == {0o600}
    assert not folder.joinpath("kits", "hospital-b").exists()


@pytest.mark.usefixtures("folder")
def test_the_same_request_and_fingerprint_come_out_at_both_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    first = _request(tmp_path / "own").read_bytes()
    second = _request(tmp_path / "own")
    assert second.read_bytes() == first
    fingerprint = read_request(second).fingerprint
    assert main(["provision", "sign", str(second)]) == 0
    assert capsys.readouterr().out.count(fingerprint) == 3


def _other_site(values: dict[str, str]) -> None:
    values["site"] = "hospital-a"


def _other_node_key(values: dict[str, str]) -> None:
    values["node_key"] = make_request(Path("intruder"), "hospital-b").node_key


def _other_certificate_request(values: dict[str, str]) -> None:
    values["certificate_request"] = make_request(Path("intruder"), "hospital-b").certificate_request


def _all_but_the_signature(values: dict[str, str]) -> None:
    values |= make_request(Path("intruder"), "hospital-b").model_dump(exclude={"signature"})


def _no_signature(values: dict[str, str]) -> None:
    values["signature"] = ""


def _broken_signature(values: dict[str, str]) -> None:
    values["signature"] = "%%%"


@pytest.mark.parametrize(
    "tamper",
    [
        _other_site,
        _other_node_key,
        _other_certificate_request,
        _all_but_the_signature,
        _no_signature,
        _broken_signature,
    ],
)
def test_a_request_that_was_changed_is_refused(
    folder: Path, tmp_path: Path, tamper: Callable[[dict[str, str]], None], capsys: pytest.CaptureFixture[str]
):
    request = _request(tmp_path / "own")
    values = json.loads(request.read_text())
    tamper(values)
    request.write_text(json.dumps(values))
    assert main(["provision", "sign", str(request)]) == 2
    assert "the request is refused; found it was changed, or not signed with its node key" in capsys.readouterr().err
    assert not (folder / "server" / "sites" / "hospital-b.pub").exists()


def test_a_request_of_a_stranger_or_of_a_site_that_is_in_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for name, complaint in (("stranger", "of no site in the file"), ("hospital-a", "hospital-a is let in already")):
        make_request(tmp_path / name, name)
        assert main(["provision", "sign", str(tmp_path / name / "request.json")]) == 2
        assert complaint in capsys.readouterr().err
    assert not (folder / "server" / "sites" / "stranger.pub").exists()


@pytest.mark.parametrize("content", [b"", b"{}", b"null", b'{"format": 2}', b"x" * 70_000, b"\xff\xfe"])
def test_what_is_no_request_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "request.json").write_bytes(content)
    with pytest.raises(ConfigError):
        read_request(tmp_path / "request.json")


def test_a_revoked_site_is_out_with_every_certificate_it_ever_had(folder: Path, capsys: pytest.CaptureFixture[str]):
    first = _certificate(folder / "server" / "sites" / "hospital-a.crt")
    assert main(["provision", "renew", "hospital-a"]) == 0
    second = _certificate(folder / "server" / "sites" / "hospital-a.crt")
    (folder / "server" / "sites" / "hospital-a.node").write_text("4711\n")
    assert _revoked(folder) == set()
    capsys.readouterr()
    for _ in range(2):
        assert main(["provision", "revoke", "hospital-a"]) == 0
        assert _revoked(folder) == {first.serial_number, second.serial_number}
        assert not (folder / "server" / "sites" / "hospital-a.pub").exists()
        said = capsys.readouterr().out
        assert f"FLWR_HOME={folder}/server/flwr flwr supernode unregister 4711 lung-study" in said
    assert main(["provision", "federation.toml"]) == 0
    assert "hospital-a is revoked and gets no kit" in capsys.readouterr().out
    assert not (folder / "server" / "sites" / "hospital-a.pub").exists()


def test_the_script_registers_who_is_in_and_unregisters_who_is_out(folder: Path, tmp_path: Path):
    """With a stand-in for ``flwr`` that writes down what it is asked; the real one is asked in the test of the service."""
    asked = tmp_path / "asked"
    stand_in = tmp_path / "bin" / "flwr"
    stand_in.parent.mkdir()
    stand_in.write_text(
        f'#!/bin/sh\necho "$@" >> {asked}\necho \'{{"success": true, "node-id": 12345678901234567890}}\'\n'
    )
    stand_in.chmod(0o755)

    def register() -> list[str]:
        asked.write_text("")
        environment = {"PATH": f"{stand_in.parent}:/usr/bin:/bin"}
        subprocess.run([folder / "server" / "register.sh"], env=environment, check=True, capture_output=True)
        return asked.read_text().splitlines()

    assert register() == ["supernode register sites/hospital-a.pub lung-study --name hospital-a --format json"]
    assert (folder / "server" / "sites" / "hospital-a.node").read_text() == "12345678901234567890\n"
    assert register() == []
    assert main(["provision", "revoke", "hospital-a"]) == 0
    assert register() == ["supernode unregister 12345678901234567890 lung-study"]
    assert register() == []


def test_renewal_keeps_the_keys_and_moves_the_end(folder: Path, tmp_path: Path):
    authority = Authority.read(folder / "authority")
    old = {}
    for name, path in (("server", "server.crt"), ("site", "sites/hospital-a.crt")):
        public = _certificate(folder / "server" / path).public_key()
        make = authority.server_certificate if name == "server" else authority.site_certificate
        subject = ("fl.example.org",) if name == "server" else "hospital-a"
        old[path] = make(public, subject, 10)  # type: ignore[operator]
        write_certificate(folder / "server" / path, old[path])
    assert main(["provision", "status"]) == 1, "both end within 30 days"
    assert main(["provision", "renew"]) == 0
    assert main(["provision", "status"]) == 0
    for path, before in old.items():
        after = _certificate(folder / "server" / path)
        assert after.public_key() == before.public_key()
        assert after.not_valid_after_utc - datetime.now(UTC) > timedelta(days=364)
    names = _certificate(folder / "server" / "server.crt").extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert "localhost" in names.value.get_values_for_type(x509.DNSName)
    shutil.unpack_archive(folder / "kits" / "hospital-a-renewal.tar.gz", tmp_path / "at-the-site", filter="data")
    unpacked = tmp_path / "at-the-site" / "hospital-a"
    assert sorted(path.name for path in unpacked.iterdir()) == ["ca.crt", "site.crt"]
    assert _certificate(unpacked / "site.crt") == _certificate(folder / "server" / "sites" / "hospital-a.crt")
    assert _certificate(folder / "kits" / "hospital-a" / "site.crt") == _certificate(unpacked / "site.crt")


def test_nothing_is_renewed_that_holds_long_enough(folder: Path, capsys: pytest.CaptureFixture[str]):
    before = (folder / "server" / "server.crt").read_bytes()
    capsys.readouterr()
    assert main(["provision", "renew"]) == 0
    assert capsys.readouterr().out == "nothing ends within 60 days\n"
    assert (folder / "server" / "server.crt").read_bytes() == before


def test_a_certificate_never_outlives_its_authority(folder: Path):
    authority = Authority.read(folder / "authority")
    public = _certificate(folder / "server" / "server.crt").public_key()
    long = authority.server_certificate(public, ("localhost",), 100_000)  # type: ignore[arg-type]
    assert long.not_valid_after_utc == authority.certificate.not_valid_after_utc


def test_status_tells_every_party(folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder.parent / "federation.toml").write_text(FEDERATION.replace('"hospital-a"', '"hospital-c"'))
    capsys.readouterr()
    assert main(["provision", "status", "--json"]) == 0
    states = {row["name"]: row["state"] for row in json.loads(capsys.readouterr().out)}
    assert states == {
        "authority": "authority",
        "server": "server",
        "hospital-a": "in, not in the file",
        "hospital-b": "awaits request",
        "hospital-c": "no kit yet",
    }
