"""Flower's Kubernetes executor with our configuration: the Pod that it makes of a task, and the rights that it takes."""

from __future__ import annotations

import kubernetes_validate
import pytest
import yaml
from flwr.supercore.constant import ExecutorType, TaskType
from flwr.supercore.superexec.executor.config import load_executor_config
from flwr.supercore.superexec.executor.factory import _kubernetes_executor_config_from_mapping
from flwr.supercore.superexec.executor.kubernetes_executor import KubernetesExecutor
from flwr.supercore.superexec.executor.types import ExecutionSpec, LaunchResult

from tests.kustomize import KUBERNETES, Object, build, find, is_restricted, named, pod_templates

CONFIG = KUBERNETES / "pods" / "executor.yaml"
BUILT = build(KUBERNETES / "examples" / "site-pods")


class Cluster:
    """The part of Kubernetes' API that Flower's executor calls, in memory; keeps who was called."""

    def __init__(self) -> None:
        self.pods: dict[str, Object] = {}
        self.secrets: dict[str, Object] = {}
        self.calls: set[tuple[str, str, str]] = set()

    def create_namespaced_secret(self, namespace: str, body: Object) -> None:
        self.calls.add((namespace, "secrets", "create"))
        self.secrets[body["metadata"]["name"]] = body

    def create_namespaced_pod(self, namespace: str, body: Object) -> None:
        self.calls.add((namespace, "pods", "create"))
        self.pods[body["metadata"]["name"]] = body | {"status": {"phase": "Running"}}

    def delete_namespaced_secret(self, name: str, namespace: str) -> None:
        self.calls.add((namespace, "secrets", "delete"))
        del self.secrets[name]

    def delete_namespaced_pod(self, name: str, namespace: str, grace_period_seconds: int = 30) -> None:
        self.calls.add((namespace, "pods", "delete"))
        assert grace_period_seconds == 0
        del self.pods[name]

    def list_namespaced_secret(self, namespace: str, label_selector: str) -> Object:
        self.calls.add((namespace, "secrets", "list"))
        return {"items": _labelled(self.secrets, label_selector)}

    def list_namespaced_pod(self, namespace: str, label_selector: str) -> Object:
        self.calls.add((namespace, "pods", "list"))
        return {"items": _labelled(self.pods, label_selector)}


def _labelled(objects: dict[str, Object], selector: str) -> list[Object]:
    wanted = dict(each.split("=") for each in selector.split(","))
    return [each for each in objects.values() if wanted.items() <= each["metadata"]["labels"].items()]


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


@pytest.fixture
def executor(cluster: Cluster) -> KubernetesExecutor:
    config = _kubernetes_executor_config_from_mapping(load_executor_config(str(CONFIG), ExecutorType.KUBERNETES))
    return KubernetesExecutor(client=cluster, config=config)  # type: ignore[arg-type]


def launch(executor: KubernetesExecutor, task: int = 7) -> LaunchResult:
    [superexec] = [template["spec"] for name, template in pod_templates(BUILT) if name == "superexec"]
    address = superexec["containers"][0]["args"][1].removeprefix("--runtime-api-address=")
    spec = ExecutionSpec(TaskType.CLIENT_APP, address, "secret-token", True, None, False, None, False, task)
    return executor.launch(spec)


def test_a_task_becomes_a_pod_without_rights_that_kubernetes_takes(executor: KubernetesExecutor, cluster: Cluster):
    assert launch(executor) == LaunchResult.accepted()
    [pod], [secret] = cluster.pods.values(), cluster.secrets.values()
    del pod["status"]
    for each in (pod, secret):
        kubernetes_validate.validate(each, "1.37", strict=True)
        assert each["metadata"]["namespace"] == "fedllm-site"
    is_restricted(pod["spec"])
    assert pod["spec"]["automountServiceAccountToken"] is False
    assert "serviceAccountName" not in pod["spec"]
    assert "secret-token" not in yaml.safe_dump(pod)
    [container] = pod["spec"]["containers"]
    assert container["command"] == ["flwr-clientapp"]
    assert "--allow-runtime-dependency-installation" not in container["args"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_a_task_works_where_the_sites_own_container_works(executor: KubernetesExecutor, cluster: Cluster):
    launch(executor)
    [pod] = cluster.pods.values()
    [task] = pod["spec"]["containers"]
    site = build(KUBERNETES / "site")
    [template] = [template for name, template in pod_templates(site) if name == "site"]
    client = template["spec"]["containers"][1]
    assert task["image"] == client["image"]
    assert pod["spec"]["securityContext"] == template["spec"]["securityContext"]
    quiet = find(site, "ConfigMap", "quiet")["data"]
    assert {each["name"]: each["value"] for each in task["env"]} == quiet
    gpu = task["resources"]["limits"].pop("nvidia.com/gpu")
    assert (task["resources"], gpu) == (client["resources"], 1)
    own = {mount["mountPath"]: mount.get("readOnly", False) for mount in client["volumeMounts"]}
    seen = {mount["mountPath"]: mount.get("readOnly", False) for mount in task["volumeMounts"]}
    assert {path: seen.pop(path) for path in own} == own
    assert seen == {"/kit/site.toml": True, "/run/flwr/appio": True}


def test_what_a_task_mounts_exists(executor: KubernetesExecutor, cluster: Cluster):
    launch(executor)
    [pod] = cluster.pods.values()
    claims = {
        each["persistentVolumeClaim"]["claimName"] for each in pod["spec"]["volumes"] if "persistentVolumeClaim" in each
    }
    assert claims == named(BUILT, "PersistentVolumeClaim")
    assert [each["configMap"]["name"] for each in pod["spec"]["volumes"] if "configMap" in each] == ["policy"]
    assert [each["secret"]["secretName"] for each in pod["spec"]["volumes"] if "secret" in each] == list(
        cluster.secrets
    )


def test_its_rights_are_what_flower_uses_and_no_more(executor: KubernetesExecutor, cluster: Cluster):
    types = {TaskType.CLIENT_APP}
    assert executor.get_eligible_capacity(types) == (types, set())
    launch(executor)
    assert executor.get_eligible_capacity(types) == (set(), set()), "one task at a time"
    for pod in cluster.pods.values():
        pod["status"]["phase"] = "Succeeded"
    executor._sweep_completed_pods()
    assert not cluster.pods
    assert not cluster.secrets
    assert executor.get_eligible_capacity(types) == (types, set())
    executor.close()
    [rule] = find(BUILT, "Role", "superexec")["rules"]
    granted = {("fedllm-site", kind, verb) for kind in rule["resources"] for verb in rule["verbs"]}
    assert granted == cluster.calls
    assert find(BUILT, "RoleBinding", "superexec")["subjects"][0]["namespace"] == "fedllm-site"
