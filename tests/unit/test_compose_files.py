"""Our compose files, by the schema of the Compose Specification, and as Compose lays one over the other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.kustomize import REPOSITORY

BASE = REPOSITORY / "docker-compose.yml"
OVERLAYS = sorted((REPOSITORY / "deploy" / "compose").glob("*.yml"))
KIT = REPOSITORY / "deploy" / "site-kit" / "compose.yaml"
SCHEMA = json.loads((files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json").read_text())

each_file = pytest.mark.parametrize("path", [BASE, *OVERLAYS, KIT], ids=lambda path: str(path.relative_to(REPOSITORY)))


def complaints(content: Any) -> list[str]:
    return [each.message for each in jsonschema.Draft202012Validator(SCHEMA).iter_errors(content)]


@each_file
def test_every_file_is_as_the_specification_describes_it(path: Path):
    assert complaints(yaml.safe_load(path.read_text())) == []


@each_file
def test_no_file_needs_a_newer_compose_than_debians(path: Path):
    known = {"version", "services", "networks", "volumes", "configs", "secrets"}
    found = {key for key in yaml.safe_load(path.read_text()) if not key.startswith("x-")}
    assert found <= known, "Compose 1.29 knows no others"


def test_the_schema_refuses_what_is_wrong():
    content = yaml.safe_load(BASE.read_text())
    content["services"]["superlink"]["read-only"] = True
    [complaint] = complaints(content)
    assert "'read-only' was unexpected" in complaint


@each_file
def test_every_name_that_is_referred_to_exists(path: Path):
    content = yaml.safe_load(path.read_text())
    below = yaml.safe_load(BASE.read_text()) if path in OVERLAYS else {}
    services, networks, volumes = (
        (below.get(key) or {}) | (content.get(key) or {}) for key in ("services", "networks", "volumes")
    )
    for name, service in content["services"].items():
        assert set(service.get("depends_on", ())) <= set(services), name
        assert set(service.get("networks", ())) <= set(networks), name
        for volume in service.get("volumes", ()):
            source = str(volume).split(":", 1)[0]
            assert source.startswith((".", "/", "${")) or source in volumes, (name, volume)
            if source.startswith("./"):
                assert ((BASE if below else path).parent / source).exists(), "Compose starts at the first file's folder"


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_an_overlay_changes_services_that_exist_or_brings_whole_ones(overlay: Path):
    services = yaml.safe_load(BASE.read_text())["services"]
    for name, service in yaml.safe_load(overlay.read_text())["services"].items():
        assert name in services or "image" in service, name


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="Compose is not installed")
@pytest.mark.parametrize("overlay", [None, *OVERLAYS], ids=str)
def test_compose_takes_the_file_and_every_overlay(overlay: Path | None):
    chosen = [part for path in (BASE, overlay) if path for part in ("-f", str(path))]
    command = ["docker-compose", *chosen, "config"]
    said = subprocess.run(
        command, env=os.environ | {"GRAFANA_PASSWORD": "x"}, capture_output=True, text=True, check=False
    )
    assert said.returncode == 0, said.stderr
    assert set(yaml.safe_load(said.stdout)["services"]) >= {"superlink", "serverapp", "gateway", "site-a", "site-b"}
