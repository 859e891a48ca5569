"""In everything that we ship Flower tells nobody anything, looks for no newer release, and installs nothing at run time.

Each way to start Flower's programs has its own way to say so; together these tests go over all files under ``deploy/``, the
compose files, the image and the site's service. A file that starts Flower in a way that none of them knows fails the first.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from client_app.service.flower import QUIET
from tests.kustomize import KUBERNETES, REPOSITORY, build, containers, each_root, find, pod_templates

DEPLOY = REPOSITORY / "deploy"
TELLS_NOTHING = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
INSTALLS_NOTHING = {"FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1"}
SILENT = TELLS_NOTHING | INSTALLS_NOTHING
STARTS_FLOWER = re.compile(r"\bflower-(?:superlink|superexec|supernode)\b|\bflwr (?:run|supernode|list|log|stop)\b")
ASSIGNMENT = re.compile(r"\b((?:FLWR|HF_HUB)_[A-Z_]+)[=:]\s*\"?([01])\b")

SHIPPED = [path for path in sorted(DEPLOY.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]
SHIPPED += [REPOSITORY / "docker-compose.yml", REPOSITORY / "Makefile"]
KNOWN = {".sh": "shell", ".sbatch": "shell", ".md": "words", ".service": "service", ".yaml": "yaml", ".yml": "yaml"}


def code(path: Path) -> str:
    """Return a file without the lines that are comments."""
    return "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))


def by_name(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


@pytest.mark.parametrize("path", SHIPPED, ids=by_name)
def test_every_file_that_starts_flower_is_of_a_known_kind_and_turns_nothing_on(path: Path):
    text = code(path)
    assert "--allow-runtime-dependency-installation" not in text
    wanted = SILENT | {"HF_HUB_DISABLE_TELEMETRY": "1"}
    for name, value in ASSIGNMENT.findall(text):
        assert wanted.get(name, value) == value, (name, value)
    if STARTS_FLOWER.search(text):
        assert path.suffix in KNOWN


def starts(suffixes: tuple[str, ...]) -> list[Path]:
    return [path for path in SHIPPED if path.suffix in suffixes and STARTS_FLOWER.search(code(path))]


@pytest.mark.parametrize("path", starts((".sh", ".sbatch", ".md")), ids=by_name)
def test_scripts_and_instructions_say_so_before_they_start_flower(path: Path):
    text = code(path)
    if path.name == "demo.sh":  # every flwr of it runs in the operator's container
        commands = [line for line in text.splitlines() if STARTS_FLOWER.search(line)]
        assert all('"${operator[@]}" flwr' in line for line in commands)
        return
    starts_processes = "flower-" in text or path.name == "run.sh"
    said = dict(ASSIGNMENT.findall(text[: STARTS_FLOWER.search(text).start()]))  # type: ignore[union-attr]
    assert (SILENT if starts_processes else TELLS_NOTHING).items() <= said.items()
    assert "export" in text
    if "exec flower-superlink" in text:
        assert "--disable-runtime-dependency-installation" in text


def image_environment() -> dict[str, str]:
    return dict(ASSIGNMENT.findall(code(DEPLOY / "images" / "Dockerfile")))


def test_images_say_so_and_compose_files_do_not_take_it_back():
    assert SILENT.items() <= image_environment().items()
    for path in [path for path in SHIPPED if path.suffix in (".yml", ".yaml") and "services:" in code(path)]:
        for name, service in yaml.safe_load(path.read_text())["services"].items():
            environment = dict(service.get("environment", {}))
            assert not set(SILENT) & set(environment), (path, name)
            assert "env_file" not in service
            image, command = service.get("image", ""), str(service.get("command", ""))
            if STARTS_FLOWER.search(command.replace("', '", " ")):
                assert re.fullmatch(r"\$\{(SERVER|SITE)_IMAGE:-fedllm-(server|site)\}", image), (path, name)


def test_a_sites_kit_starts_flower_through_its_service_alone():
    assert (SILENT | {"HF_HUB_DISABLE_TELEMETRY": "1"}).items() <= QUIET.items()
    for path in (*(DEPLOY / "site-kit").iterdir(), *(DEPLOY / "systemd").iterdir(), *(DEPLOY / "slurm").iterdir()):
        assert not STARTS_FLOWER.search(code(path)), path
    assert "site" in code(DEPLOY / "slurm" / "fedllm-site.sbatch")


@each_root
def test_every_pod_says_so(root: str):
    objects = build(KUBERNETES / root)
    for name, template in pod_templates(objects):
        for container in containers(template["spec"]):
            if "fedllm-" in container["image"] and "args" in container:
                maps = [each["configMapRef"]["name"] for each in container["envFrom"]]
                said = {key: value for each in maps for key, value in find(objects, "ConfigMap", each)["data"].items()}
                assert SILENT.items() <= said.items(), name
                assert not set(SILENT) & {each["name"] for each in container.get("env", ())}


def test_pods_of_flowers_executor_say_so():
    config = yaml.safe_load((KUBERNETES / "pods" / "executor.yaml").read_text())
    assert SILENT.items() <= {each["name"]: each["value"] for each in config["env"]}.items()


def test_the_makefile_says_so_for_all_it_runs():
    said = dict(re.findall(r"^export (\w+) := (\S+)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    assert SILENT.items() <= said.items()


def test_flower_listens_to_these_names():
    """Asks Flower itself, in a process with the environment of a site's service and in one without."""
    ask = (
        "from flwr.supercore.telemetry import FLWR_TELEMETRY_ENABLED as told\n"
        "from flwr.superlink.cli.flower_superlink import _runtime_dependency_install_default as installs\n"
        "print(told, installs())"
    )
    bare = {key: value for key, value in os.environ.items() if key not in SILENT}
    answers = [
        subprocess.run([sys.executable, "-c", ask], env=bare | more, check=True, capture_output=True, text=True).stdout
        for more in ({}, SILENT)
    ]
    assert answers == ["1 True\n", "0 False\n"]
