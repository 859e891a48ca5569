"""What ``fedllm provision federation.toml`` makes, checked by others' means: X.509 verification, Flower's key readers."""

from __future__ import annotations

import hashlib
import ipaddress
import shutil
import ssl
import subprocess
import tarfile
import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key, load_ssh_public_key
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from client_app.site import load_site_config
from fedllm.cli.main import main
from fedllm.errors import ConfigError
from fedllm.provision.federation import read_federation
from fedllm.provision.kit import read_kit
from fedllm.provision.templates import deploy_folder

FEDERATION = """
[federation]
name = "lung-study"

[server]
host = "fl.example.org"
port = 8443
names = ["10.1.2.3"]

[[sites]]
name = "hospital-a"
node_config = { region = "north", beds = 3 }

[[sites]]
name = "hospital-b"
"""


@pytest.fixture(scope="module")
def provisioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("operator")
    (folder / "federation.toml").write_text(FEDERATION)
    assert main(["provision", str(folder / "federation.toml")]) == 0
    return folder / "lung-study"


def _certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def _policy(ca: Path, days: float = 360) -> PolicyBuilder:
    return PolicyBuilder().store(Store([_certificate(ca)])).time(datetime.now(UTC) + timedelta(days=days))


def _contents(folder: Path) -> dict[str, tuple[str, int, int]]:
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
            path.stat().st_mode,
            path.stat().st_mtime_ns,
        )
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("name", ["fl.example.org", "localhost", "10.1.2.3", "127.0.0.1", "::1"])
def test_the_servers_certificate_holds_for_all_its_names(provisioned: Path, name: str):
    subject = x509.IPAddress(ipaddress.ip_address(name)) if name[0] in "1:" else x509.DNSName(name)
    leaf = _certificate(provisioned / "server" / "server.crt")
    verifier = _policy(provisioned / "server" / "ca.crt").build_server_verifier(subject)
    assert len(verifier.verify(leaf, [])) == 2


def test_the_servers_certificate_holds_for_no_other_name_and_not_for_ever(provisioned: Path):
    leaf, ca = _certificate(provisioned / "server" / "server.crt"), provisioned / "server" / "ca.crt"
    with pytest.raises(VerificationError):
        _policy(ca).build_server_verifier(x509.DNSName("evil.example.org")).verify(leaf, [])
    late = _policy(ca, days=366)
    with pytest.raises(VerificationError):
        late.build_server_verifier(x509.DNSName("fl.example.org")).verify(leaf, [])
    with pytest.raises(VerificationError):
        _policy(ca).build_client_verifier().verify(leaf, [])


def test_a_sites_certificate_says_who_it_is_and_serves_no_server(provisioned: Path):
    kit = provisioned / "kits" / "hospital-a"
    leaf = _certificate(kit / "site.crt")
    verified = _policy(kit / "ca.crt").build_client_verifier().verify(leaf, [])
    assert [name.value for name in verified.subjects or ()] == ["urn:fedllm:lung-study:hospital-a"]
    with pytest.raises(VerificationError):
        _policy(kit / "ca.crt").build_server_verifier(x509.DNSName("fl.example.org")).verify(leaf, [])
    key = load_pem_private_key((kit / "site.key").read_bytes(), None)
    assert key.public_key() == leaf.public_key()


def test_a_node_key_is_what_flower_takes(provisioned: Path):
    from flwr.cli.supernode.register import try_load_public_key
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    key = load_ssh_private_key((provisioned / "kits" / "hospital-a" / "node.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert isinstance(key.curve, ec.SECP384R1)
    registered = try_load_public_key(provisioned / "server" / "sites" / "hospital-a.pub")
    assert registered == public_key_to_bytes(key.public_key())


def test_no_two_keys_are_the_same(provisioned: Path):
    keys = [
        load_pem_private_key(path.read_bytes(), None) for path in provisioned.rglob("*.key") if "node" not in path.name
    ]
    keys += [load_ssh_private_key(path.read_bytes(), None) for path in provisioned.rglob("node.key")]
    public = [key.public_key() for key in keys]
    assert len(keys) == 6
    assert all(one != other for index, one in enumerate(public) for other in public[:index])


def test_secrets_are_their_owners_alone(provisioned: Path):
    for path in (provisioned, *provisioned.rglob("*")):
        if path.is_dir():
            assert path.stat().st_mode & 0o777 == 0o700, path
        secret = path.is_file() and (b"PRIVATE KEY" in path.read_bytes() or path.suffix in (".secret", ".gz"))
        assert not secret or path.stat().st_mode & 0o777 == 0o600, path
    assert len((provisioned / "server" / "superexec.secret").read_bytes()) == 32
    with tarfile.open(provisioned / "kits" / "hospital-a.tar.gz") as tar:
        modes = {member.name: member.mode for member in tar}
    assert modes["hospital-a"] == 0o700
    assert modes["hospital-a/node.key"] == modes["hospital-a/site.key"] == 0o600


def test_no_private_key_of_a_site_or_of_the_authority_lies_with_the_server(provisioned: Path):
    private = [
        path.name for path in (provisioned / "server").rglob("*") if path.is_file() and b"PRIVATE" in path.read_bytes()
    ]
    assert private == ["server.key"]
    with tarfile.open(provisioned / "kits" / "hospital-a.tar.gz") as tar:
        assert not [name for name in tar.getnames() if "ca.key" in name or "secret" in name or "hospital-b" in name]


def test_nothing_secret_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "federation.toml").write_text(FEDERATION)
    assert main(["provision", str(tmp_path / "federation.toml")]) == 0
    printed = "".join(capsys.readouterr())
    lines = [line for path in tmp_path.rglob("*.key") for line in path.read_text().splitlines() if "-----" not in line]
    assert len(lines) > 10
    assert not [line for line in lines if line in printed]


def test_a_second_call_changes_nothing(provisioned: Path, capsys: pytest.CaptureFixture[str]):
    before = _contents(provisioned)
    assert main(["provision", str(provisioned.parent / "federation.toml")]) == 0
    assert _contents(provisioned) == before
    assert capsys.readouterr().out == f"nothing to do in {provisioned}\n"


def test_a_new_site_gets_its_kit_and_nothing_else_changes(tmp_path: Path):
    file = tmp_path / "federation.toml"
    file.write_text(FEDERATION)
    main(["provision", str(file)])
    before = _contents(tmp_path / "lung-study")
    file.write_text(FEDERATION + '\n[[sites]]\nname = "hospital-c"\n')
    main(["provision", str(file)])
    after = _contents(tmp_path / "lung-study")
    changed = {name for name in after if after[name] != before.get(name) and "hospital-c" not in name}
    assert changed == {"authority/issued", "kits", "server/sites"}, "only folders, because they have new entries"
    assert "kits/hospital-c/node.key" in after


def test_a_kit_that_was_handed_over_and_deleted_is_not_made_anew(tmp_path: Path):
    file = tmp_path / "federation.toml"
    file.write_text(FEDERATION)
    main(["provision", str(file)])
    kits = tmp_path / "lung-study" / "kits"
    shutil.rmtree(kits / "hospital-a")
    (kits / "hospital-a.tar.gz").unlink()
    before = _contents(tmp_path / "lung-study")
    main(["provision", str(file)])
    assert _contents(tmp_path / "lung-study") == before


def test_a_call_that_was_interrupted_is_given_again(tmp_path: Path):
    file = tmp_path / "federation.toml"
    file.write_text(FEDERATION)
    main(["provision", str(file)])
    folder = tmp_path / "lung-study"
    (folder / "server" / "sites" / "hospital-a.pub").unlink()  # written last: nobody was let in yet
    (folder / "kits" / "hospital-a.tar.gz").unlink()
    main(["provision", str(file)])
    kit = folder / "kits" / "hospital-a"
    assert (folder / "server" / "sites" / "hospital-a.pub").read_text() == (kit / "node.pub").read_text()
    assert _certificate(folder / "server" / "sites" / "hospital-a.crt") == _certificate(kit / "site.crt")
    assert (folder / "kits" / "hospital-a.tar.gz").exists()


def test_a_lost_authority_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "federation.toml"
    file.write_text(FEDERATION)
    main(["provision", str(file)])
    shutil.rmtree(tmp_path / "lung-study" / "authority")
    assert main(["provision", str(file)]) == 2
    assert "another authority would shut out every site" in capsys.readouterr().err


def test_names_that_the_certificate_lacks_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "federation.toml"
    file.write_text(FEDERATION)
    main(["provision", str(file)])
    file.write_text(FEDERATION.replace('"10.1.2.3"', '"10.1.2.3", "fl2.example.org"'))
    main(["provision", str(file)])
    assert "the server's certificate lacks fl2.example.org: fedllm provision renew --server" in capsys.readouterr().out


def test_asking_sites_for_certificates_can_be_switched_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "federation.toml"
    file.write_text(FEDERATION)
    main(["provision", str(file)])
    asks = tmp_path / "lung-study" / "server" / "site-certificates.conf"
    assert asks.exists()
    file.write_text(FEDERATION.replace("port = 8443", "port = 8443\nsite_certificates = false"))
    main(["provision", str(file)])
    assert not asks.exists()
    assert "removed server/site-certificates.conf" in capsys.readouterr().out


def test_the_sites_own_file_is_filled_in_and_can_be_read(provisioned: Path):
    kit = provisioned / "kits" / "hospital-a"
    config = load_site_config(kit / "site.toml")
    assert config.site.name == "hospital-a"
    assert config.transport.address == "fl.example.org:8443"
    files = (config.transport.ca, config.transport.certificate, config.transport.key)
    assert files == (kit / "ca.crt", kit / "site.crt", kit / "site.key")
    assert read_kit(kit).node_config == {"region": "north", "beds": 3}
    assert read_kit(kit).server == "fl.example.org:8443"
    context = ssl.create_default_context(cafile=str(kit / "ca.crt"))
    context.load_cert_chain(kit / "site.crt", kit / "site.key")


def test_no_place_of_a_template_stays_open(provisioned: Path):
    for path in provisioned.rglob("*"):
        if path.is_file() and path.suffix not in (".gz", ".secret"):
            text = path.read_text()
            assert not [word for word in text.split() if word.startswith("@") and word.endswith("@")], path
            assert "${GATEWAY" not in text


@pytest.mark.parametrize("script", ["superlink.sh", "superexec.sh", "gateway.sh", "register.sh"])
def test_scripts_of_the_server_are_sound_shell(provisioned: Path, script: str):
    subprocess.run(["sh", "-n", str(provisioned / "server" / script)], check=True)


def test_ways_to_start_a_site_are_sound(provisioned: Path):
    kit = provisioned / "kits" / "hospital-a"
    subprocess.run(["sh", "-n", str(kit / "start.sh")], check=True)
    subprocess.run(["bash", "-n", str(kit / "fedllm-site.sbatch")], check=True)
    compose = yaml.safe_load((kit / "compose.yaml").read_text())
    assert compose["services"]["site"]["command"] == ["fedllm", "site", "start", "--foreground", "/kit"]
    assert "ports" not in compose["services"]["site"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (FEDERATION.replace("host =", "hots ="), "server.hots: unknown key, did you mean 'host'"),
        (
            FEDERATION.replace("fl.example.org", "https://fl.example.org"),
            "server.host: expected a DNS name or an IP address",
        ),
        (FEDERATION.replace("8443", "70000"), "server.port: Input should be less than or equal to 65535, found 70000"),
        (FEDERATION.replace("hospital-b", "Hospital-A"), "two sites are called 'hospital-a'"),
        (FEDERATION.replace("hospital-b", "../b"), "sites.2.name: String should match pattern"),
        (FEDERATION.replace("lung-study", "Lung Study"), "federation.name: String should match pattern"),
        (FEDERATION.replace("beds = 3", "site-config = 'x'"), "node_config: 'site-config' cannot be set here"),
        (FEDERATION.replace('"lung-study"', '"lung-study"\nvalidity_days = 0'), "federation.validity_days"),
        (FEDERATION.replace('"lung-study"', '"lung-study"\nauthority_days = 90'), "validity_days must be smaller"),
        ("[federation", "is not TOML"),
    ],
)
def test_a_wrong_file_is_refused_with_the_key_that_is_wrong(tmp_path: Path, text: str, complaint: str):
    (tmp_path / "federation.toml").write_text(text)
    with pytest.raises(ConfigError) as refused:
        read_federation(tmp_path / "federation.toml")
    assert complaint in str(refused.value)
    assert str(tmp_path / "federation.toml") in str(refused.value)


def test_every_template_is_packaged():
    project = tomllib.loads((deploy_folder().parent / "pyproject.toml").read_text())
    patterns = [pattern for group in project["tool"]["setuptools"]["data-files"].values() for pattern in group]
    packaged = {path for pattern in patterns for path in deploy_folder().parent.glob(pattern)}
    folders = ("server", "site-kit", "slurm", "systemd", "gateway")
    assert packaged >= {path for folder in folders for path in (deploy_folder() / folder).iterdir()}


def test_public_keys_are_lines_of_openssh(provisioned: Path):
    line = (provisioned / "server" / "sites" / "hospital-b.pub").read_text()
    assert line.endswith(" hospital-b\n")
    assert line.startswith("ecdsa-sha2-nistp384 ")
    assert isinstance(load_ssh_public_key(line.encode()), ec.EllipticCurvePublicKey)
