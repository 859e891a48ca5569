"""Who may speak to whom in ``deploy/kubernetes``: its NetworkPolicies, evaluated as Kubernetes defines them."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from tests.kustomize import KUBERNETES, Object, build, pod_templates

WORLD = "world"
FEDERATION, OTHER = "198.51.100.7", "198.51.100.8"
PORTS = [53, 443, 6443, 8000, 8443, 9094, 9190, 9199, 9200, 9250, 9299, 9300]


def matches(selector: Object, labels: dict[str, str]) -> bool:
    """Say whether a label selector takes these labels."""
    assert set(selector) <= {"matchLabels", "matchExpressions"}
    expressions = selector.get("matchExpressions", ())
    assert all(each["operator"] == "In" for each in expressions)
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()) and all(
        labels.get(each["key"]) in each["values"] for each in expressions
    )


class Network:
    """Pods of one namespace by their ``app``, addresses of the world, and DNS, as policies see them.

    A connection needs leave at both ends: of the policies that take its Pod, where any does, one must have a rule for it.
    """

    def __init__(self, objects: list[Object], *more: str) -> None:
        self.policies = [each["spec"] for each in objects if each["kind"] == "NetworkPolicy"]
        self.pods = [template["metadata"]["labels"]["app"] for _, template in pod_templates(objects)] + list(more)

    def allows(self, source: str, target: str, port: int) -> bool:
        return self._leave("Ingress", target, source, port) and self._leave("Egress", source, target, port)

    def _leave(self, direction: str, pod: str, peer: str, port: int) -> bool:
        if pod not in self.pods:
            return True
        taken = [
            policy
            for policy in self.policies
            if direction in policy["policyTypes"] and matches(policy["podSelector"], {"app": pod})
        ]
        rules = [rule for policy in taken for rule in policy.get(direction.lower(), ())]
        side = {"Ingress": "from", "Egress": "to"}[direction]
        return not taken or any(
            any(_holds(each, port) for each in rule["ports"]) and self._is_named(rule.get(side), peer) for rule in rules
        )

    def _is_named(self, peers: list[Object] | None, peer: str) -> bool:
        return peers is None or any(self._is(each, peer) for each in peers)

    def _is(self, named: Object, peer: str) -> bool:
        if "ipBlock" in named:
            return peer[0].isdigit() and ip_address(peer) in ip_network(named["ipBlock"]["cidr"])
        if "namespaceSelector" in named:
            return peer == "dns" and matches(named["namespaceSelector"], {"kubernetes.io/metadata.name": "kube-system"})
        return peer in self.pods and matches(named["podSelector"], {"app": peer})


def _holds(rule: dict[str, Any], port: int) -> bool:
    assert isinstance(rule["port"], int)
    return bool(rule["port"] <= port <= rule.get("endPort", rule["port"]))


def reach(network: Network, *strangers: str) -> dict[str, set[str]]:
    """Return for every Pod and stranger what it reaches, as ``target:port``; DNS, which all may ask, is left out."""
    targets = [*network.pods, *strangers]
    for pod in network.pods:
        assert network.allows(pod, "dns", 53)
        assert not any(network.allows(pod, "dns", port) for port in PORTS[1:])
    return {
        source: {
            f"{target}:{port}"
            for target in targets
            for port in PORTS
            if source != target and {source, target} & set(network.pods) and network.allows(source, target, port)
        }
        for source in targets
    }


def test_the_world_reaches_the_gateway_and_nothing_else_of_a_server():
    found = reach(Network(build(KUBERNETES / "server")), WORLD)
    assert found == {
        WORLD: {"gateway:8443"},
        "gateway": {"superlink:8000", "serverapp:9200", "serverapp:9250", "serverapp:9299"},
        "serverapp": {"superlink:8000"},
        "superlink": set(),
    }


@pytest.mark.parametrize("root", ["site", "examples/site"])
def test_a_site_reaches_its_federation_and_nobody_reaches_a_site(root: str):
    federation = {"site": "203.0.113.10", "examples/site": FEDERATION}[root]
    found = reach(Network(build(KUBERNETES / root)), WORLD, federation, OTHER)
    assert found == {WORLD: set(), federation: set(), OTHER: set(), "site": {f"{federation}:443"}}


def test_tasks_in_pods_of_their_own_reach_supernode_and_federation():
    found = reach(Network(build(KUBERNETES / "examples/site-pods"), "task"), WORLD, FEDERATION, OTHER, "10.0.0.1")
    assert found == {
        WORLD: set(),
        FEDERATION: set(),
        OTHER: set(),
        "10.0.0.1": set(),
        "site": {f"{FEDERATION}:443"},
        "superexec": {"site:9094", "10.0.0.1:443", "10.0.0.1:6443"},
        "task": {"site:9094", f"{FEDERATION}:443"},
    }
