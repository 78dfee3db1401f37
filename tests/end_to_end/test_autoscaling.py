"""Ray's own autoscaler, with nodes on this machine: they are added for replicas that wait for room, and leave."""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from conftest import make_checkpoint, wait_until
from quire import AsyncClient
from quire.cli.config import AdminConfig
from quire.cli.operate import Control
from quire_protos.v1 import control_pb2 as pb
from web import LIMIT, free_port

NUM_STREAMS, NUM_TOKENS = 8, 2000
_HEAD = "f" * 51 + "00000"  # that the provider of nodes takes for its head
_PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
_EMPTY = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
_EMPTY += ("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files")


def scaling(address: str) -> str:
    """A file for `ray start`: nodes with a CPU and a GPU (which is not real, but Ray gives it to a worker), each gone
    after six seconds without use."""
    node = {"resources": {"CPU": 1, "GPU": 1, "object_store_memory": 80000000}, "node_config": {}, "max_workers": 3}
    head = {"resources": {"GPU": 1}, "node_config": {}, "max_workers": 0}
    provider = {"type": "external", "module": _PROVIDER, "gcs_address": address, "head_node_id": _HEAD}
    return json.dumps(
        {
            "cluster_name": "test",
            "max_workers": 3,
            "idle_timeout_minutes": 0.1,
            "provider": provider | {"launch_multiple": True, "disable_node_updaters": True},
            "available_node_types": {"ray.head.default": head, "node": node},  # as the provider calls it
            "head_node_type": "ray.head.default",
        }
        | {name: [] for name in _EMPTY}
    )


@pytest.fixture
def ray_address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A cluster of a head, on which no replica has room (it has a GPU and no CPU), and its autoscaler."""
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    environment = os.environ | {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "1",  # with the 15 that Ray sets else, whatever else runs here starves them
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": _HEAD,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    ray = str(Path(sys.executable).with_name("ray"))
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:  # pytest's own is too long
        config, said = Path(folder, "scaling.json"), Path(folder, "said")
        config.write_text(scaling(address))
        options = f"--head --block --num-cpus 0 --num-gpus 1 --port {address.rpartition(':')[2]} --temp-dir {folder}"
        options += f" --ray-client-server-port {free_port()} --autoscaling-config {config}"
        options += " --object-store-memory 80000000 --include-dashboard false"
        with said.open("wb") as output:
            command = [ray, "start", *options.split()]
            head = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        try:
            wait_until(lambda: "Ray runtime started" in said.read_text() or head.poll() is not None)
            assert head.poll() is None, said.read_text()
            yield address
        finally:
            head.terminate()
            head.wait(120)
            for process in psutil.process_iter(["cmdline"]):  # nodes that the autoscaler has not taken away
                if any(folder in part for part in process.info["cmdline"] or ()):
                    process.kill()


@dataclass
class Cluster:
    """Of `quire start`, as its operator sees it."""

    control: Control
    grpc: str

    @property
    def nodes(self) -> set[str]:
        """But the head."""
        return {node.id for node in self._status.nodes if not node.head}

    @property
    def replicas(self) -> list[pb.ReplicaStatus]:
        """Of its only deployment."""
        return list(self._status.deployments[0].replicas)

    @property
    def _status(self) -> pb.StatusResponse:
        found: pb.StatusResponse = self.control.call("Status", pb.StatusRequest())
        return found

    def scale(self, replicas: int) -> None:
        self.control.call("Scale", pb.ScaleRequest(name="tiny", replicas=replicas))


def quire(*arguments: str) -> str:
    command = [sys.executable, "-m", "quire.cli.main", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def cluster(ray_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """With a gateway on each node that has replicas. They share their ports, so a stream goes through any of them."""
    monkeypatch.setenv("QUIRE_HOME", str(tmp_path))
    ports = {name: str(free_port()) for name in ("--port", "--grpc-port", "--admin-port", "--admin-grpc-port")}
    given = [part for option in ports.items() for part in option]
    quire("start", "--ray-address", ray_address, "--gateways-on", "all", *given)
    with Control(AdminConfig()) as control:
        yield Cluster(control, f"127.0.0.1:{ports['--grpc-port']}")
    assert "has ended" in quire("shutdown")


async def streams(cluster: Cluster, disturb: Callable[[], None]) -> list[list[int]]:
    """Tokens of each; `disturb` runs once all have begun."""
    begun = asyncio.Barrier(NUM_STREAMS + 1)

    async def one(number: int) -> list[int]:
        tokens: list[int] = []
        options = {"temperature": number % 2, "seed": number, "max_tokens": NUM_TOKENS, "ignore_eos": True}
        async with AsyncClient(cluster.grpc) as client:
            async for output in client.stream([5 + number, 17, 30], timeout=LIMIT, **options):
                if not tokens:
                    await begun.wait()
                tokens += output.token_ids
        return tokens

    running = [asyncio.ensure_future(one(number)) for number in range(NUM_STREAMS)]
    await begun.wait()
    await asyncio.to_thread(disturb)
    return await asyncio.gather(*running)


@pytest.mark.slow
def test_nodes_are_added_for_replicas_and_leave(cluster: Cluster, tmp_path: Path) -> None:
    """One replica goes while streams run: they lose nothing, and its node goes with it."""
    make_checkpoint(tmp_path / "model", "qwen3", max_position_embeddings=4096)
    wanted = tmp_path / "models.yaml"
    wanted.write_text("tiny: {model: model, cpu_threads: 1, min_replicas: 2}")
    assert cluster.nodes == set()
    quire("deploy", str(wanted))
    wait_until(lambda: [replica.phase for replica in cluster.replicas] == ["serving"] * 2)
    placed = [set(replica.nodes) for replica in cluster.replicas]
    assert [len(nodes) for nodes in placed] == [1, 1]
    assert set.union(*placed) == cluster.nodes, "one on each of two"

    def both_run() -> bool:
        return all(replica.running for replica in cluster.replicas)

    def scale_down() -> None:
        wait_until(both_run)
        cluster.scale(1)
        wait_until(lambda: "draining" in [replica.phase for replica in cluster.replicas])

    undisturbed = asyncio.run(streams(cluster, lambda: wait_until(both_run)))
    assert [len(tokens) for tokens in undisturbed] == [NUM_TOKENS] * NUM_STREAMS
    assert asyncio.run(streams(cluster, scale_down)) == undisturbed
    wait_until(lambda: len(cluster.nodes) == 1)
    assert [set(replica.nodes) for replica in cluster.replicas] == [cluster.nodes], "the other one's stayed"
    cluster.scale(0)
    wait_until(lambda: not cluster.nodes)
