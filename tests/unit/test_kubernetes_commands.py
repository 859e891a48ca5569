"""``deploy/kubernetes`` starts what Compose starts, and what Flower takes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from client_app.service.flower import QUIET
from tests.free_ports import free_port
from tests.kustomize import COMPOSE, KUBERNETES, REPOSITORY, Object, build, each_root, find, pod_templates


def _container(objects: list[Object], workload: str, name: str) -> Object:
    [pod] = [template["spec"] for each, template in pod_templates(objects) if each == workload]
    [found] = [container for container in pod["containers"] if container["name"] == name]
    return found


def _different(here: list[str], there: list[str]) -> tuple[set[str], set[str]]:
    return set(here) - set(there), set(there) - set(here)


def test_commands_and_environment_are_those_of_compose():
    server, site = build(KUBERNETES / "server"), build(KUBERNETES / "site")
    health = "--health-server-address=0.0.0.0:9190"
    assert _different(_container(server, "superlink", "superlink")["args"], COMPOSE["superlink"]["command"]) == (
        {"--disable-runtime-dependency-installation"},
        set(),
    )
    assert _different(_container(server, "serverapp", "serverapp")["args"], COMPOSE["serverapp"]["command"]) == (
        {health},
        set(),
    )
    assert _different(_container(site, "site", "client")["args"], COMPOSE["site-a"]["command"]) == (
        {health, "--runtime-api-address=127.0.0.1:9094"},
        {"--runtime-api-address=node:9094"},
    )
    assert _different(_container(site, "site", "node")["args"], COMPOSE["site-a-node"]["command"]) == (
        {"--superlink=$(SERVER)", "--host=127.0.0.1", "--node-config=/kit/node.toml"},
        {"--superlink=gateway:8443", "--host=0.0.0.0", '--node-config=site-config="/kit/site.toml"'},
    )


def test_the_gateway_is_that_of_compose():
    server = build(KUBERNETES / "server")
    gateway, compose = _container(server, "gateway", "gateway"), COMPOSE["gateway"]
    text = find(server, "ConfigMap", "gateway")["data"]["nginx.conf"]
    assert text == (REPOSITORY / "deploy" / "gateway" / "nginx.conf").read_text()
    assert "./deploy/gateway/nginx.conf:/etc/fedllm/nginx.conf:ro" in compose["volumes"]
    begin, resolver, fill = gateway["command"][2].split(" && ", 2)
    assert resolver.startswith("export RESOLVER=\"$(sed -n 's/^nameserver //p' /etc/resolv.conf")
    assert [*gateway["command"][:2], f"{begin} && {fill}"] == [part.replace("$$", "$") for part in compose["command"]]
    there = {key: value for key, value in compose["environment"].items() if key != "RESOLVER"}
    here = {each["name"]: each["value"] for each in gateway["env"] if "value" in each}
    domain = f".$(NAMESPACE).svc.$({'CLUSTER_DOMAIN'})"
    assert here.pop("CLUSTER_DOMAIN") == "cluster.local"
    assert {key: value.replace(domain, "") for key, value in here.items()} == there
    assert set(re.findall(r"\$\{(\w+)\}", text)) == set(here) | {"RESOLVER"}


def _flower_parser(command: str) -> Any:
    from flwr.supercore.cli.flower_superexec import _parse_args
    from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink
    from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

    parsers = {"superexec": _parse_args, "supernode": _parse_args_run_supernode}
    return (parsers | {"superlink": _parse_args_run_superlink})[command.removeprefix("flower-")]()


@each_root
def test_flower_takes_every_command(root: str):
    for _, template in pod_templates(build(KUBERNETES / root)):
        for container in template["spec"]["containers"]:
            if "args" in container:
                parsed = _flower_parser(container["args"][0]).parse_args(container["args"][1:])
                assert not parsed.runtime_dependency_install
                assert getattr(parsed, "isolation", "process") == "process"
                assert parsed.superexec_auth_secret_file


def test_a_superexec_answers_its_probe():
    """Starts what the Pod starts, where no SuperNode is; the kubelet asks the port of ``--health-server-address``."""
    container = _container(build(KUBERNETES / "site"), "site", "client")
    port = free_port()
    arguments = [each for each in container["args"][1:] if "secret" not in each and "health" not in each]
    arguments += [f"--health-server-address=127.0.0.1:{port}"]
    command = [str(Path(sys.executable).parent / "flower-superexec"), *arguments]
    process = subprocess.Popen(command, env=os.environ | QUIET, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = HealthStub(channel)
            answer = stub.Check(HealthCheckRequest(service=""), timeout=120, wait_for_ready=True)
        assert answer.status == HealthCheckResponse.SERVING
    finally:
        process.kill()
        process.wait()
