"""The systemd units of a site's kit and of the server's folder, by systemd's own tools and by what they must hold."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from fedllm.cli.main import main

UNITS = {
    "fedllm-site.service": "/opt/fedllm-site",
    "fedllm-superlink.service": "/opt/fedllm-server",
    "fedllm-superexec.service": "/opt/fedllm-server",
    "fedllm-gateway.service": "/opt/fedllm-server",
}
LEAST_EXPOSED = 2.5  # of 10, as `systemd-analyze security` rates it

each_unit = pytest.mark.parametrize("unit", UNITS)
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every unit, as it is made, with the folder that it was made for in place of the one under ``/opt``."""
    folder = tmp_path_factory.mktemp("systemd")
    (folder / "federation.toml").write_text(
        '[federation]\nname = "study"\n[server]\nhost = "fl.example.org"\nport = 443\n[[sites]]\nname = "a"\n'
    )
    assert main(["provision", str(folder / "federation.toml")]) == 0
    homes = {"/opt/fedllm-site": folder / "study" / "kits" / "a", "/opt/fedllm-server": folder / "study" / "server"}
    made = {
        "/opt/fedllm-site": homes["/opt/fedllm-site"],
        "/opt/fedllm-server": homes["/opt/fedllm-server"] / "systemd",
    }
    for unit, home in UNITS.items():
        text = (made[home] / unit).read_text()
        (folder / unit).write_text(text.replace(home, str(homes[home])))
    return {unit: folder / unit for unit in UNITS}


def settings(unit: Path) -> dict[str, list[str]]:
    """Return all values of every setting of a unit."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            key, value = line.split("=", 1)
            found.setdefault(key, []).append(value)
    return found


@needs_systemd
@each_unit
def test_systemd_takes_the_unit(installed: dict[str, Path], unit: str):
    checked = subprocess.run(
        ["systemd-analyze", "verify", installed[unit]], capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stderr) == (0, "")


@needs_systemd
@each_unit
def test_systemd_finds_it_little_exposed(installed: dict[str, Path], unit: str):
    command = [
        "systemd-analyze",
        "security",
        "--offline=true",
        f"--threshold={LEAST_EXPOSED * 10:.0f}",
        installed[unit],
    ]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout[-200:]


@each_unit
def test_it_runs_without_rights_and_is_started_again_for_ever(installed: dict[str, Path], unit: str):
    found = settings(installed[unit])
    wanted = {
        "User": "fedllm",
        "Restart": "always",
        "UMask": "0077",
        "NoNewPrivileges": "yes",
        "ProtectSystem": "strict",
    }
    assert {key: found[key] for key in wanted} == {key: [value] for key, value in wanted.items()}
    capability = "CAP_NET_BIND_SERVICE" if unit == "fedllm-gateway.service" else ""
    assert found["CapabilityBoundingSet"] == [capability]
    assert found.get("AmbientCapabilities", [""]) == [capability]
    assert "MemoryMax" in found
    assert "@" not in "".join(found["Description"])


@each_unit
def test_it_keeps_the_devices_that_it_needs_and_no_others(installed: dict[str, Path], unit: str):
    found = settings(installed[unit])
    takes_devices = {"PrivateDevices", "ProtectClock", "DevicePolicy", "DeviceAllow"}
    assert bool(takes_devices & set(found)) == (unit != "fedllm-site.service"), "a site trains on a GPU"


def test_flower_speaks_with_nobody_but_its_machine(installed: dict[str, Path]):
    for unit in ("fedllm-superlink.service", "fedllm-superexec.service"):
        found = settings(installed[unit])
        assert (found["IPAddressDeny"], found["IPAddressAllow"]) == (["any"], ["localhost"])
    secret, key = "superexec.secret", "server.key"
    assert secret in settings(installed["fedllm-gateway.service"])["InaccessiblePaths"][0]
    assert key in settings(installed["fedllm-superexec.service"])["InaccessiblePaths"][0]


def test_units_start_what_people_start_by_hand(installed: dict[str, Path]):
    for unit, script in (("superlink", "superlink.sh"), ("superexec", "superexec.sh"), ("gateway", "gateway.sh")):
        [command] = settings(installed[f"fedllm-{unit}.service"])["ExecStart"]
        [path] = [word.strip("'") for word in command.split() if script in word]
        assert Path(path).stat().st_mode & 0o100
    [command] = settings(installed["fedllm-site.service"])["ExecStart"]
    assert "fedllm site start --foreground" in command
