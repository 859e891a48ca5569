"""The overlay for containers: its files hold what they promise, without a Docker engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from client_app.observability.families import LOSSES, SERVICE, WORK
from fedllm.observability.address import Address
from server_app.observability.families import FAMILIES

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "observability"
OVERLAY = ROOT / "deploy" / "compose" / "observability.yml"
BASE = ROOT / "docker-compose.yml"
DASHBOARD = json.loads((FOLDER / "grafana" / "dashboards" / "fedllm.json").read_text())
SERIES = {series for family in FAMILIES for series in family.series}
PROCESS = {"process_resident_memory_bytes", "process_cpu_seconds_total", "process_start_time_seconds"}
LABELS = {label for family in FAMILIES for label in family.labels} | {"run", "job", "instance"}


def docker_compose() -> list[str] | None:
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    found = shutil.which("docker") and subprocess.run(["docker", "compose", "version"], capture_output=True)
    return ["docker", "compose"] if found and found.returncode == 0 else None


@pytest.fixture(scope="module")
def merged() -> dict[str, Any]:
    """The federation with the overlay, put together by Compose itself; that needs no engine."""
    command = docker_compose()
    if command is None:
        pytest.skip("no Compose here")
    files = ["-f", str(BASE), "-f", str(OVERLAY)]
    environment = {**os.environ, "GRAFANA_PASSWORD": "a password"}
    done = subprocess.run([*command, *files, "config"], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return dict(yaml.safe_load(done.stdout))


def networks(merged: dict[str, Any], service: str) -> set[str]:
    return set(merged["services"][service]["networks"])


def expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_no_site_shares_a_network_with_prometheus_or_grafana(merged: dict[str, Any]) -> None:
    watching = networks(merged, "prometheus") | networks(merged, "grafana")
    for service in ("site-a", "site-b", "site-a-node", "site-b-node", "gateway", "superlink", "operator"):
        if service in merged["services"]:
            assert not networks(merged, service) & watching, service
    assert networks(merged, "prometheus") == {"observability"}, "not the backend, where the SuperLink answers"
    assert networks(merged, "serverapp") == {"backend", "observability"}
    assert merged["networks"]["observability"]["internal"] is True


def test_what_watches_runs_without_rights_and_writes_to_its_volume_alone(merged: dict[str, Any]) -> None:
    for name in ("prometheus", "grafana"):
        service = merged["services"][name]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert int(service["user"].split(":")[0]) > 0
        writable = [volume for volume in service["volumes"] if not _is_read_only(volume)]
        assert len(writable) == 1
        assert service["image"].rpartition(":")[2] not in ("latest", service["image"]), "a release by name"


def _is_read_only(volume: Any) -> bool:
    return bool(volume.get("read_only")) if isinstance(volume, dict) else str(volume).endswith(":ro")


def test_what_is_kept_is_bounded_and_only_grafana_is_published_on_the_loopback(merged: dict[str, Any]) -> None:
    command = " ".join(merged["services"]["prometheus"]["command"])
    assert re.search(r"retention\.time=\d+d", command)
    assert re.search(r"retention\.size=\d+GB", command)
    assert "ports" not in merged["services"]["prometheus"]
    assert "ports" not in merged["services"]["serverapp"]
    [port] = merged["services"]["grafana"]["ports"]
    assert (port["host_ip"] if isinstance(port, dict) else str(port).split(":")[0]) == "127.0.0.1"


def test_there_is_no_password_that_everybody_knows() -> None:
    assert "${GRAFANA_PASSWORD:?" in OVERLAY.read_text()
    command = docker_compose()
    if command is None:
        pytest.skip("no Compose here")
    environment = {key: value for key, value in os.environ.items() if key != "GRAFANA_PASSWORD"}
    files = ["-f", str(BASE), "-f", str(OVERLAY)]
    done = subprocess.run([*command, *files, "config"], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode != 0
    assert "GRAFANA_PASSWORD" in done.stderr


def test_prometheus_asks_at_every_port_that_the_server_may_take() -> None:
    overlay = yaml.safe_load(OVERLAY.read_text())["services"]["serverapp"]["environment"]
    ports = Address.parse(overlay["FEDLLM_METRICS"]).ports
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    [job] = config["scrape_configs"]
    targets = [target for group in job["static_configs"] for target in group["targets"]]
    assert targets == [f"serverapp:{port}" for port in ports]
    for name in config["rule_files"]:
        assert (FOLDER / name).is_file()
    assert job["job_name"] == "fedllm-server", "as the dashboard has it"


def test_every_file_that_the_overlay_mounts_is_there() -> None:
    for name in ("prometheus", "grafana"):
        for volume in yaml.safe_load(OVERLAY.read_text())["services"][name]["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith(".") or (ROOT / source).exists(), source


@pytest.mark.parametrize("expression", [*expressions(), *(rule["expr"] for rule in rules())])
def test_every_figure_asked_for_is_one_that_the_server_shows(expression: str) -> None:
    names = set(re.findall(r"\b(?:fedllm|process)_\w+", expression))
    assert names, "an expression asks for something"
    assert names <= SERIES | PROCESS
    for inside in re.findall(r"\{([^}]*)\}", expression):
        assert {part.split("=")[0].rstrip("~!").strip() for part in inside.split(",")} <= LABELS
    for grouped in re.findall(r"by \(([^)]*)\)", expression):
        assert {label.strip() for label in grouped.split(",")} <= LABELS


def test_every_figure_of_the_server_that_changes_is_on_the_dashboard_or_known_to_be_not() -> None:
    shown = set(re.findall(r"fedllm_\w+", json.dumps(DASHBOARD)))
    left_out = {family.name for family in FAMILIES if not shown & set(family.series)}
    assert left_out <= {
        "fedllm_rounds_total",
        "fedllm_sites_left_out_total",
        "fedllm_heldout_accuracy_ratio",
        "fedllm_update_norm",
        "fedllm_discarded_energy_ratio",
        "fedllm_trained_tokens_total",
        "fedllm_trained_steps_total",
        "fedllm_round_seconds",
        "fedllm_run_ended",
        "fedllm_spool_files",
    }


def test_the_dashboard_is_one_that_grafana_provisions() -> None:
    source = yaml.safe_load((FOLDER / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"][0]
    provider = yaml.safe_load((FOLDER / "grafana/provisioning/dashboards/fedllm.yml").read_text())["providers"][0]
    mounts = yaml.safe_load(OVERLAY.read_text())["services"]["grafana"]["volumes"]
    assert any(mount.split(":")[1] == provider["options"]["path"] for mount in mounts)
    assert source["uid"] == "prometheus"
    assert DASHBOARD["schemaVersion"] >= 36
    assert DASHBOARD["uid"]
    assert DASHBOARD["editable"] is False
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(numbers)
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24
        assert panel["datasource"]["uid"] == source["uid"]
        assert panel["title"]
        assert panel["description"]
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {source["uid"]}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    cells = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells), "no panel covers another"
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert set(re.findall(r"\$(\w+)", " ".join(expressions()))) <= variables


@pytest.mark.parametrize("page", ["operator.md", "site-admin.md"])
def test_the_pages_tell_every_figure(page: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    families = FAMILIES if page == "operator.md" else (*WORK, *LOSSES, *SERVICE)
    told = set(re.findall(r"`(fedllm_\w+)", text))
    assert {family.name for family in families} <= told
    known = {family.name for family in (*FAMILIES, *WORK, *LOSSES, *SERVICE)}
    assert told <= known | SERIES, "nothing is told that there is not"
