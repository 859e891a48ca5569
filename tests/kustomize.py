"""What `kubectl kustomize` makes of a folder, as far as ``deploy/kubernetes`` uses it, so that tests need no kubectl.

Anything else in a kustomization is refused. Generated ConfigMaps keep their names; kustomize adds a hash of the contents.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

Object = dict[str, Any]
REPOSITORY = Path(__file__).parents[1]
KUBERNETES = REPOSITORY / "deploy" / "kubernetes"
COMPOSE = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())["services"]
CLUSTER_WIDE = ("Namespace",)
_KEYS = {"apiVersion", "kind", "namespace", "resources", "components", "configMapGenerator", "images", "patches"}
_ROOTS = ["server", "site", "examples/server", "examples/site", "examples/site-pods"]

each_root = pytest.mark.parametrize("root", _ROOTS)
"""Runs a test for every folder that a person may build."""


def build(folder: Path, given: list[Object] | None = None) -> list[Object]:
    """Return the objects of a folder; a component changes those that it is given."""
    text = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert not set(text) - _KEYS, f"{folder}: {set(text) - _KEYS} is not understood here"
    objects = list(given or [])
    for name in text.get("resources", ()):
        path = (folder / name).resolve()
        objects += build(path) if path.is_dir() else [each for each in yaml.safe_load_all(path.read_text()) if each]
    for name in text.get("components", ()):
        objects = build((folder / name).resolve(), objects)
    objects += [_config_map(folder, generator) for generator in text.get("configMapGenerator", ())]
    for patch in text.get("patches", ()):
        _patch(objects, patch)
    for image in text.get("images", ()):
        _rename(objects, image)
    if namespace := text.get("namespace"):
        _move(objects, namespace)
    return objects


def pod_templates(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """Yield name and Pod template of every workload."""
    for each in objects:
        if each["kind"] in ("StatefulSet", "Deployment", "DaemonSet", "Job"):
            yield each["metadata"]["name"], each["spec"]["template"]


def containers(pod: Object) -> list[Object]:
    """Return all containers of a Pod's spec, those of its beginning too."""
    return [*pod.get("initContainers", ()), *pod["containers"]]


def find(objects: list[Object], kind: str, name: str) -> Object:
    """Return the one object of this kind and name."""
    [found] = [each for each in objects if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


def named(objects: list[Object], kind: str) -> set[str]:
    """Return the names of all objects of a kind."""
    return {each["metadata"]["name"] for each in objects if each["kind"] == kind}


def is_restricted(pod: Object) -> None:
    """Hold a Pod to what the restricted Pod security standard asks for, and to a root file system that is read only."""
    volumes = [set(volume) - {"name"} for volume in pod["volumes"]]
    assert all(kind <= {"configMap", "emptyDir", "projected", "secret", "persistentVolumeClaim"} for kind in volumes)
    assert not {"hostNetwork", "hostPID", "hostIPC", "hostUsers"} & set(pod)
    context = pod["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["runAsUser"] == context["runAsGroup"] == 10001
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in containers(pod):
        own = container["securityContext"]
        assert own == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert set(container["resources"]["requests"]) >= {"cpu", "memory"}
        assert "memory" in container["resources"]["limits"]


def _config_map(folder: Path, generator: Object) -> Object:
    assert set(generator) <= {"name", "files", "literals"}
    data = {Path(name).name: (folder / name).read_text() for name in generator.get("files", ())}
    data |= dict(literal.split("=", 1) for literal in generator.get("literals", ()))
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": generator["name"]}, "data": data}


def _patch(objects: list[Object], patch: Object) -> None:
    target = patch["target"]
    assert set(patch) == {"target", "patch"}
    assert set(target) <= {"kind", "name"}
    hit = [each for each in objects if each["kind"] == target["kind"]]
    hit = [each for each in hit if target.get("name") in (None, each["metadata"]["name"])]
    assert hit, f"nothing to patch: {target}"
    for each in hit:
        for step in yaml.safe_load(patch["patch"]):
            _step(each, **copy.deepcopy(step))


def _step(document: Any, op: str, path: str, value: Any = None) -> None:
    """Do one step of a JSON Patch (RFC 6902)."""
    *way, last = [part.replace("~1", "/").replace("~0", "~") for part in path[1:].split("/")]
    for part in way:
        document = document[int(part) if isinstance(document, list) else part]
    key: Any = int(last) if isinstance(document, list) else last
    assert op in ("add", "replace", "remove")
    if op == "remove":
        del document[key]
    elif op == "replace" or isinstance(document, dict):
        assert op == "add" or isinstance(document, list) or key in document, f"nothing to replace at {path}"
        document[key] = value
    else:
        document.insert(key, value)


def _rename(objects: list[Object], image: Object) -> None:
    for _, template in pod_templates(objects):
        for each in containers(template["spec"]):
            name, _, tag = each["image"].partition(":")
            if name == image["name"]:
                each["image"] = f"{image.get('newName', name)}:{image.get('newTag', tag)}"


def _move(objects: list[Object], namespace: str) -> None:
    for each in objects:
        if each["kind"] in CLUSTER_WIDE:
            each["metadata"]["name"] = namespace
        else:
            each["metadata"]["namespace"] = namespace
        for subject in each.get("subjects", ()):
            subject["namespace"] = namespace


def without_hashes(objects: list[Object], names: set[str]) -> list[Object]:
    """Return objects with the hashes taken off the names of generated ConfigMaps."""
    pattern = re.compile(rf"^({'|'.join(sorted(names))})-[a-z0-9]{{10}}$")

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items()}
        if isinstance(value, list):
            return [plain(each) for each in value]
        return pattern.sub(r"\1", value) if isinstance(value, str) else value

    return [plain(each) for each in objects]
