"""``deploy/kubernetes``: by the schemas of Kubernetes, and that all of it fits together, to Compose, and to Flower."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from flwr.common.config import parse_config_args

from fedllm.cli.main import main
from tests.kustomize import KUBERNETES, Object, build, containers, each_root, find, named, pod_templates, without_hashes

VERSIONS = ["1.29", "1.37"]
KUBECTL = shutil.which("kubectl")

needs_kubectl = pytest.mark.skipif(KUBECTL is None, reason="kubectl is not installed")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Object]]:
    """What ``objects.sh`` makes of a provisioned federation, for the server and for a site."""
    if KUBECTL is None:
        pytest.skip("kubectl is not installed")
    folder = tmp_path_factory.mktemp("provisioned")
    (folder / "federation.toml").write_text(
        '[federation]\nname = "study"\n[server]\nhost = "fl.example.org"\nport = 443\nnames = ["superlink"]\n'
        '[[sites]]\nname = "a"\nnode_config = { region = "north", beds = 3 }\n'
    )
    assert main(["provision", str(folder / "federation.toml")]) == 0
    return {kind: _objects(kind, folder / "study" / path) for kind, path in (("server", "server"), ("site", "kits/a"))}


def _objects(kind: str, folder: Path) -> list[Object]:
    command = [KUBERNETES / "objects.sh", kind, folder]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [each for each in yaml.safe_load_all(text) if each]


def made_for(made: dict[str, list[Object]], root: str) -> list[Object]:
    return made["server" if "server" in root else "site"]


@needs_kubectl
@each_root
def test_kubectl_builds_what_the_tests_look_at(root: str):
    text = subprocess.run(
        ["kubectl", "kustomize", KUBERNETES / root], check=True, capture_output=True, text=True
    ).stdout
    found = without_hashes(list(yaml.safe_load_all(text)), {"quiet", "gateway", "executor"})

    def by_name(objects: list[Object]) -> dict[tuple[str, str], Object]:
        return {(each["kind"], each["metadata"]["name"]): each for each in objects}

    assert by_name(found) == by_name(build(KUBERNETES / root))


@each_root
@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_as_kubernetes_describes_it(root: str, version: str):
    for each in build(KUBERNETES / root):
        kubernetes_validate.validate(each, version, strict=True)


def test_the_schemas_refuse_what_is_wrong():
    wrong = find(build(KUBERNETES / "server"), "StatefulSet", "superlink")
    wrong["spec"]["template"]["spec"]["containers"][0]["securityContext"]["readOnlyRootFileSystem"] = True
    with pytest.raises(kubernetes_validate.ValidationError, match="readOnlyRootFileSystem"):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


@each_root
def test_every_name_that_is_referred_to_exists(root: str, made: dict[str, list[Object]]):
    objects = build(KUBERNETES / root) + made_for(made, root)
    config_maps, secrets, claims = (named(objects, kind) for kind in ("ConfigMap", "Secret", "PersistentVolumeClaim"))
    for name, template in pod_templates(objects):
        pod = template["spec"]
        assert pod.get("serviceAccountName", "superexec") in named(objects, "ServiceAccount") | {"superexec"}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for source in (each for volume in volumes.values() for each in _sources(volume)):
            kind, reference = next(iter(source.items()))
            assert reference in {"secret": secrets, "configMap": config_maps, "claim": claims}[kind], (name, source)
        for container in containers(pod):
            assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes), name
            for each in container.get("envFrom", ()):
                assert each["configMapRef"]["name"] in config_maps
            for each in container.get("env", ()):
                reference = each.get("valueFrom", {}).get("configMapKeyRef")
                assert not reference or reference["key"] in find(objects, "ConfigMap", reference["name"])["data"]
    for name in named(objects, "StatefulSet"):
        assert find(objects, "StatefulSet", name)["spec"]["serviceName"] in named(objects, "Service")


def _sources(volume: Object) -> list[dict[str, str]]:
    """Return what a volume takes from other objects, by kind."""
    parts = volume.get("projected", {}).get("sources", [volume])
    found = [
        {"secret": part["secret"].get("secretName") or part["secret"]["name"]} for part in parts if "secret" in part
    ]
    found += [{"configMap": part["configMap"]["name"]} for part in parts if "configMap" in part]
    claim = volume.get("persistentVolumeClaim")
    return found + ([{"claim": claim["claimName"]}] if claim else [])


@each_root
def test_every_file_that_is_mounted_or_named_in_a_command_is_in_its_object(root: str, made: dict[str, list[Object]]):
    objects = build(KUBERNETES / root) + made_for(made, root)
    for name, template in pod_templates(objects):
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        for container in containers(template["spec"]):
            files: set[str] = set()
            for mount in container["volumeMounts"]:
                files |= {f"{mount['mountPath']}/{path}" for path in _paths(objects, volumes[mount["name"]])}
            words = " ".join(container.get("args", []) + container.get("command", []))
            words += " ".join(each.get("value", "") for each in container.get("env", ()))
            used = set(re.findall(r"/(?:federation|secret|kit|etc/fedllm)/[\w.-]+", words))
            assert used - files <= {"/kit/site.toml"}, (name, used - files)


def _paths(objects: list[Object], volume: Object) -> set[str]:
    """Return the files of a volume made from Secrets and ConfigMaps; every item must be there."""
    found: set[str] = set()
    for part in volume.get("projected", {}).get("sources", [volume]):
        for kind, key in (("Secret", "secret"), ("ConfigMap", "configMap")):
            if source := part.get(key):
                data = find(objects, kind, source.get("secretName") or source["name"])["data"]
                items = source.get("items") or [{"key": each, "path": each} for each in data]
                assert {item["key"] for item in items} <= set(data), source
                found |= {item["path"] for item in items}
    return found


@each_root
def test_services_lead_to_pods_and_probes_to_ports(root: str):
    objects = build(KUBERNETES / root)
    pods = {template["metadata"]["labels"]["app"]: template["spec"] for _, template in pod_templates(objects)}
    for name in named(objects, "Service"):
        service = find(objects, "Service", name)["spec"]
        ports = {
            port["name"] for each in containers(pods[service["selector"]["app"]]) for port in each.get("ports", ())
        }
        for port in service["ports"]:
            assert port.get("targetPort", "number") in ports | {"number"}, name
    for app, pod in pods.items():
        for container in pod["containers"]:
            own = {port["name"] for port in container.get("ports", ())}
            own |= {port["containerPort"] for port in container.get("ports", ())}
            assert "livenessProbe" in container, app
            for probe in (container[key] for key in container if key.endswith("Probe")):
                [target] = [probe[kind] for kind in ("httpGet", "grpc", "tcpSocket", "exec") if kind in probe]
                assert target.get("port") in own or target.get("command", ["", ""])[1] == "/opt/app/probe.py", app


def test_flower_reads_what_the_site_tells_about_itself(made: dict[str, list[Object]], tmp_path: Path):
    data = find(made["site"], "ConfigMap", "site")["data"]
    (tmp_path / "node.toml").write_text(data["node.toml"])
    assert parse_config_args([str(tmp_path / "node.toml")]) == {
        "site-config": "/kit/site.toml",
        "region": "north",
        "beds": 3,
    }
    assert data["server"] == "fl.example.org:443"
