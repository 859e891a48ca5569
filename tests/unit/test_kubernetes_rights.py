"""What Pods of ``deploy/kubernetes`` may do: on their node, with keys, over the network."""

from __future__ import annotations

import re
import tomllib

import yaml

from tests.kustomize import (
    COMPOSE,
    KUBERNETES,
    REPOSITORY,
    Object,
    build,
    containers,
    each_root,
    is_restricted,
    pod_templates,
)


@each_root
def test_no_pod_has_more_rights_than_it_needs(root: str):
    objects = build(KUBERNETES / root)
    for name, template in pod_templates(objects):
        is_restricted(template["spec"])
        assert template["spec"]["automountServiceAccountToken"] is (name == "superexec"), name
    namespace = next(each for each in objects if each["kind"] == "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert {each["metadata"].get("namespace") for each in objects} == {None, namespace["metadata"]["name"]}


def test_keys_are_mounted_only_where_they_are_used():
    server, site, pods = (build(KUBERNETES / root) for root in ("server", "site", "examples/site-pods"))
    assert _holders(server, "server.key") == {"superlink/superlink", "gateway/gateway"}
    assert _holders(server, "superexec.secret") == {"superlink/superlink", "serverapp/serverapp"}
    assert _holders(site, "node.key") == {"site/node"}
    assert _holders(site, "site.key") == {"site/client"}
    assert _holders(pods, "node.key") == {"site/node"}
    assert _holders(pods, "site.key") == {"superexec/kit"}
    for objects, owner in ((site, "client"), (pods, "none in a workload")):
        for name, template in pod_templates(objects):
            for container in containers(template["spec"]):
                mounts = {mount["name"] for mount in container["volumeMounts"]}
                assert ("data" in mounts) == (container["name"] == owner), name


def _holders(objects: list[Object], key: str) -> set[str]:
    return {
        f"{name}/{container['name']}"
        for name, template in pod_templates(objects)
        for volume in template["spec"]["volumes"]
        if key in yaml.safe_dump(volume)
        for container in containers(template["spec"])
        if volume["name"] in {mount["name"] for mount in container["volumeMounts"]}
    }


@each_root
def test_every_image_is_pinned_to_this_release(root: str):
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    gateway = re.search(r":-nginx:([\w.-]+)}", COMPOSE["gateway"]["image"])
    assert gateway
    for _, template in pod_templates(build(KUBERNETES / root)):
        for container in containers(template["spec"]):
            name, _, tag = container["image"].rpartition(":")
            assert tag == (gateway[1] if name.endswith("nginx") else version), container["image"]
