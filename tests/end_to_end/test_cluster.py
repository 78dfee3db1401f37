"""A cluster that stays: started in a Ray cluster of its own, and worked on as operators do it while streams run."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
from conftest import listeners, wait_until
from doors import guarded_kinds
from quire import AsyncClient
from quire.cli.config import AdminConfig
from quire.cli.operate import Control
from quire_protos.v1 import control_pb2 as pb
from quire_protos.v1 import control_pb2_grpc
from ray_head import Head, free_ports, ray_head
from web import LIMIT, http

CODE = grpc.StatusCode
NUM_STREAMS, NUM_TOKENS = 4, 100
ACTORS = ("Controller", "GatewayActor", "Replica", "Worker")


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with ray_head(tmp_path_factory.mktemp("home")) as made:
        yield made


class Cluster:
    """With two models: a, of two replicas, and b."""

    def __init__(self, head: Head, folder: Path, checkpoint: Callable[[str], Path]) -> None:
        self.head = head
        self.quire = head.quire
        self.url, self.grpc = f"http://127.0.0.1:{head.http}", f"127.0.0.1:{head.grpc}"
        self.file = folder / "models.yaml"
        self._models = {"a": checkpoint("qwen3"), "b": checkpoint("llama")}
        self.key = json.loads(head.file.read_text())["key"]

    def write(self, *, seqs: int = 32, more: str = "") -> None:
        common = "  cpu-threads: 1\n  kv-cache-memory-bytes: 4194304\n"
        self.file.write_text(
            f"a:\n  model: {self._models['a']}\n  aliases: [org/a]\n  min-replicas: 2\n  max-num-seqs: {seqs}\n{common}"
            f"b:\n  model: {self._models['b']}\n{common}{more}"
        )

    def deploy(self) -> list[str]:
        done = self.quire("deploy", str(self.file))
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    def status(self) -> pb.StatusResponse:
        with Control(AdminConfig(admin_address=f"127.0.0.1:{self.head.admin_grpc}", admin_key=self.key)) as control:
            found: pb.StatusResponse = control.call("Status", pb.StatusRequest())
            return found

    def replicas(self, name: str) -> dict[int, int]:
        """Slot → epoch, where all that is wanted serves and nothing else is there."""
        [one] = [one for one in self.status().deployments if one.name == name] or [pb.DeploymentStatus()]
        whole = one.state == "ready" and {replica.phase for replica in one.replicas} == {"serving"}
        return {replica.slot: replica.epoch for replica in one.replicas} if whole else {}

    def has(self, a: int = 2, b: int = 1) -> dict[str, dict[int, int]]:
        """Waits for so many replicas."""
        wait_until(lambda: (len(self.replicas("a")), len(self.replicas("b"))) == (a, b), LIMIT)
        wait_until(lambda: {one["replicas"] for one in self.listed()} == {a, b})
        return {name: self.replicas(name) for name in ("a", "b")}

    def listed(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = http.get(f"{self.url}/v1/models").json()["data"]
        return found

    def under_load(self, act: Callable[[], None]) -> list[list[int]]:
        """Streams that go on for as long as `act` takes: the tokens of each, which were always the same."""

        async def one(client: AsyncClient, number: int, over: asyncio.Event, begun: asyncio.Barrier) -> list[int]:
            options = {"temperature": 0.0} if number % 2 else {"temperature": 0.9, "seed": number, "top_k": 40}
            prompt, found, first = [5 + number, 17, 30 + 2 * number, 99], list[list[int]](), True
            while first or not over.is_set():
                tokens: list[int] = []
                stream = client.stream(
                    prompt, model="a", max_tokens=NUM_TOKENS, ignore_eos=True, timeout=LIMIT, **options
                )
                async for output in stream:
                    tokens += output.token_ids
                    if first:
                        first = False
                        await begun.wait()
                found.append(tokens)
            assert all(tokens == found[0] and len(tokens) == NUM_TOKENS for tokens in found)
            return found[0]

        async def run() -> list[list[int]]:
            over, begun = asyncio.Event(), asyncio.Barrier(NUM_STREAMS + 1)
            async with AsyncClient(self.grpc) as client:
                streams = [asyncio.ensure_future(one(client, number, over, begun)) for number in range(NUM_STREAMS)]
                await begun.wait()
                try:
                    await asyncio.to_thread(act)
                finally:
                    over.set()
                return await asyncio.gather(*streams)

        return asyncio.run(run())


@pytest.fixture(scope="module")
def cluster(head: Head, tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str], Path]) -> Cluster:
    started = head.start()
    assert started.returncode == 0, started.stderr
    assert "the cluster has started" in started.stdout
    made = Cluster(head, tmp_path_factory.mktemp("models"), checkpoint)
    made.write()
    assert made.deploy() == ["a: created", "b: created"]
    made.has()
    return made


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> list[list[int]]:
    return cluster.under_load(lambda: None)


@pytest.mark.parametrize("option", ["port", "admin-port"])
def test_a_port_that_is_taken_is_named_and_nothing_is_left(head: Head, option: str) -> None:
    """Before anything else is started there."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = head.start(**{option: port})
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert re.fullmatch(rf"quire: cannot listen on 127\.0\.0\.1:{port} .*; choose another with --{option}", last)
    assert not head.file.exists()
    wait_until(lambda: not head.pids(*ACTORS))


def test_starting_what_runs_changes_nothing(cluster: Cluster) -> None:
    before = cluster.head.file.read_text(), cluster.head.pids(*ACTORS)
    again = cluster.head.start()
    assert again.returncode == 0, again.stderr
    assert "the cluster runs already" in again.stdout
    other = cluster.head.start(port=free_ports(1)[0])
    assert other.returncode == 1
    assert other.stderr.splitlines()[-1].startswith("quire: a cluster runs here already, with other options")
    assert (cluster.head.file.read_text(), cluster.head.pids(*ACTORS)) == before
    assert cluster.head.file.stat().st_mode & 0o077 == 0


def test_what_is_there_is_shown(cluster: Cluster) -> None:
    cluster.has()
    assert [(one["id"], one["state"], one["replicas"]) for one in cluster.listed()] == [
        ("a", "ready", 2),
        ("org/a", "ready", 2),
        ("b", "ready", 1),
    ]
    for name in ("a", "org/a", "b"):
        sent = {"model": name, "prompt": "w5", "max_tokens": 3, "temperature": 0}
        assert http.post(f"{cluster.url}/v1/completions", json=sent).json()["usage"]["completion_tokens"] == 3
    shown = cluster.quire("status")
    assert shown.returncode == 0, shown.stderr
    assert "a, org/a: ready, 2 of 2 replicas (" in shown.stdout
    assert re.search(r"^a/1 +serving ", shown.stdout, re.M)
    assert re.search(rf"^127\.0\.0\.1:{cluster.head.http} .* yes ", shown.stdout, re.M)
    whole = json.loads(cluster.quire("status", "--json").stdout)
    assert [one["name"] for one in whole["deployments"]] == ["a", "b"]
    assert "nothing waits" in cluster.quire("why").stdout


def test_the_same_file_again_changes_nothing(cluster: Cluster) -> None:
    before, pids = cluster.has(), cluster.head.pids(*ACTORS)
    assert cluster.deploy() == ["a: unchanged", "b: unchanged"]
    assert cluster.has() == before
    assert cluster.head.pids(*ACTORS) == pids


@pytest.mark.parametrize(
    ("more", "line", "why"),
    [
        ("  max-num-seqs: many\n", 12, "max_num_seqs is 'many'"),
        ("  aliases: [org/a]\n", 12, "a and b are both called org/a"),
        ("c:\n  model: /no/such/model\n", 13, "/no/such/model"),
        ("  chat-template: broken.jinja\n", 12, "the chat template is not valid Jinja"),
    ],
)
def test_a_file_that_is_refused_changes_nothing(cluster: Cluster, more: str, line: int, why: str) -> None:
    """Be it that the rest of it was good."""
    before = cluster.has()
    cluster.file.with_name("broken.jinja").write_text("{% for")
    cluster.write(seqs=5, more=more)
    done = cluster.quire("deploy", str(cluster.file))
    cluster.write()
    assert done.returncode == 1
    [said] = done.stderr.splitlines()
    assert said.startswith(f"quire: {cluster.file}, line {line}: ")
    assert why in said
    assert cluster.has() == before


def test_another_chat_template_needs_no_other_replica(cluster: Cluster) -> None:
    def prompt_tokens() -> int:
        asked = {"model": "b", "max_tokens": 1, "messages": [{"role": "user", "content": "w5"}]}
        return int(http.post(f"{cluster.url}/v1/chat/completions", json=asked).json()["usage"]["prompt_tokens"])

    before, plain = cluster.has(), prompt_tokens()
    cluster.file.with_name("talk.jinja").write_text("w6 w7 w8 {{ messages[0]['content'] }}")
    cluster.write(more="  chat-template: talk.jinja\n")
    assert cluster.deploy() == ["a: unchanged", "b: updated"]
    wait_until(lambda: prompt_tokens() == plain + 3)
    cluster.write()
    assert cluster.deploy() == ["a: unchanged", "b: updated"]
    wait_until(lambda: prompt_tokens() == plain)
    assert cluster.has() == before


@pytest.mark.slow  # three replicas are started, one after another
def test_other_options_cost_no_stream_a_token(cluster: Cluster, undisturbed: list[list[int]]) -> None:
    """Replicas are replaced one after another, of that deployment alone."""
    before = cluster.has()

    def update() -> None:
        cluster.write(seqs=16)
        assert cluster.deploy() == ["a: updated", "b: unchanged"]
        wait_until(lambda: bool(now := cluster.replicas("a")) and not now.items() & before["a"].items(), LIMIT)

    assert cluster.under_load(update) == undisturbed
    after = cluster.has()
    assert min(after["a"].values()) > max(before["a"].values())
    assert after["b"] == before["b"]


def test_a_replica_is_drained(cluster: Cluster, undisturbed: list[list[int]]) -> None:
    before = cluster.has()

    def drain() -> None:
        assert cluster.quire("drain", f"a/{min(before['a'])}").returncode == 0
        wait_until(lambda: len(now := cluster.replicas("a")) == 2 and now != before["a"], LIMIT)

    assert cluster.under_load(drain) == undisturbed
    assert len(cluster.has()["a"].items() & before["a"].items()) == 1
    for what, why in (
        ("a/9", "a has no replica 9 that serves"),
        ("none/0", "no deployment 'none'"),
        ("x", "no node is"),
    ):
        refused = cluster.quire("drain", what)
        assert refused.returncode == 1
        assert why in refused.stderr
    [node] = cluster.status().nodes
    assert "the head cannot be drained" in cluster.quire("drain", node.id[:8]).stderr


def test_scaling(cluster: Cluster, undisturbed: list[list[int]]) -> None:
    before = cluster.has()

    def fewer() -> None:
        assert cluster.quire("scale", "a", "1").returncode == 0
        wait_until(lambda: len(cluster.replicas("a")) == 1, LIMIT)

    assert cluster.under_load(fewer) == undisturbed
    assert cluster.replicas("a").items() < before["a"].items()
    assert "an operator asked for so many" in cluster.quire("status").stdout
    assert cluster.quire("scale", "a", "auto").returncode == 0
    assert cluster.has()["b"] == before["b"]
    assert cluster.quire("scale", "none", "1").returncode == 1


def test_the_controller_dies_and_nobody_notices(cluster: Cluster, undisturbed: list[list[int]]) -> None:
    before = cluster.has()
    others = cluster.head.pids("GatewayActor", "Replica", "Worker")
    [victim] = cluster.head.pids("Controller")

    def kill() -> None:
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: cluster.head.pids("Controller") not in ([], [victim]), LIMIT)
        wait_until(lambda: cluster.quire("status").returncode == 0, LIMIT)

    assert cluster.under_load(kill) == undisturbed
    assert cluster.has() == before
    assert cluster.head.pids("GatewayActor", "Replica", "Worker") == others


def test_a_gateway_dies_and_comes_back_where_it_was(cluster: Cluster, undisturbed: list[list[int]]) -> None:
    before = cluster.has()
    [victim] = cluster.head.pids("GatewayActor")
    os.kill(victim, signal.SIGKILL)

    def back() -> bool:
        try:
            return httpx.get(f"{cluster.url}/ready", timeout=10).status_code == 200
        except httpx.TransportError:
            return False

    wait_until(lambda: cluster.head.pids("GatewayActor") not in ([], [victim]) and back(), LIMIT)
    assert cluster.has() == before
    assert cluster.under_load(lambda: None) == undisturbed


def test_nothing_of_it_answers_without_a_key(cluster: Cluster) -> None:
    """But what clients ask, of gateways that have no keys. Ray's own are on the network of its nodes."""
    root, head = psutil.Process(cluster.head.process.pid), cluster.head
    ours = {head.http, head.grpc, head.admin, head.admin_grpc}
    assert {address for _, address, port in listeners(root) if port in ours} <= {"127.0.0.1", "::ffff:127.0.0.1"}
    seen, inside = guarded_kinds(root, head.token, open_ports=(head.http, head.grpc), beyond=True)
    assert {f"ray::{kind}" for kind in ACTORS} <= seen
    assert {kind for kind, _ in inside} >= {"ray::Controller", "ray::Replica", "ray::Worker", "gcs_server", "raylet"}
    assert ("ray::Controller", head.admin_grpc) in inside


def test_operators_need_the_key(cluster: Cluster) -> None:
    before = cluster.has()
    methods = pb.DESCRIPTOR.services_by_name["Control"].methods
    with grpc.insecure_channel(f"127.0.0.1:{cluster.head.admin_grpc}", [("grpc.enable_http_proxy", 0)]) as channel:
        stub: Any = control_pb2_grpc.ControlStub(channel)
        for method in methods:
            for metadata in ((), (("authorization", "Bearer wrong"),), (("authorization", f"Basic {cluster.key}"),)):
                with pytest.raises(grpc.RpcError) as refused:
                    getattr(stub, method.name)(getattr(pb, method.input_type.name)(), metadata=metadata, timeout=60)
                assert refused.value.code() is CODE.UNAUTHENTICATED, method.name
    address = f"http://127.0.0.1:{cluster.head.admin}/quire.v1.Control"
    key = {"authorization": f"Bearer {cluster.key}"}
    for name in [method.name for method in methods]:
        for headers in ({}, {"authorization": "Bearer wrong"}):
            assert http.post(f"{address}/{name}", json={}, headers=headers).status_code == 401, name
    assert cluster.has() == before

    whole = http.post(f"{address}/Status", json={}, headers=key).json()
    assert [(one["name"], len(one["replicas"])) for one in whole["deployments"]] == [("a", 2), ("b", 1)]
    assert http.post(f"{address}/Scale", json={"name": "b", "replicas": 1}, headers=key).json() == {}
    assert [one.pinned for one in cluster.status().deployments if one.HasField("pinned")] == [1]
    assert http.post(f"{address}/Scale", json={"name": "b"}, headers=key).status_code == 200
    for method, body, status, why in (
        ("Scale", {"name": "none"}, 404, "no deployment 'none'"),
        ("Scale", {"name": "b", "replicas": -1}, 400, "replicas"),
        ("Scale", {"name": "b", "replicas": 4097}, 400, "give a number up to 4096"),
        ("Drain", {}, 400, "name a replica"),
        ("Deploy", {"deployments": [{"name": "c", "options": {"max_num_seqs": 4.5}}]}, 400, "c has no model"),
        ("Destroy", {}, 404, "there is no method Destroy"),
    ):
        refused = http.post(f"{address}/{method}", json=body, headers=key)
        assert refused.status_code == status, refused.text
        assert why in refused.json()["error"]["message"]
    for method, sent in (
        ("Why", b"\xff"),
        ("Deploy", b'{"deployments": [{"name": "c", "options": {"model": 1e400}}]}'),
    ):
        refused = http.post(f"{address}/{method}", content=sent, headers=key)
        assert refused.status_code == 400, refused.text
        assert f"no {method}Request" in refused.json()["error"]["message"]
    assert cluster.has() == before


def test_deleted_and_deployed_again_while_it_ends(cluster: Cluster) -> None:
    """What runs there ends as if nothing had happened, beside the replicas of today."""
    before = cluster.has()

    async def run() -> None:
        async with AsyncClient(cluster.grpc) as client:
            options: dict[str, Any] = {"model": "b", "max_tokens": 450, "temperature": 0, "ignore_eos": True}
            plain = (await client.generate([5, 6], **options)).outputs[0].token_ids
            stream = client.stream([5, 6], timeout=LIMIT, **options)
            tokens = list((await anext(stream)).token_ids)
            deleted = await asyncio.to_thread(cluster.quire, "delete", "b")
            assert deleted.returncode == 0, deleted.stderr
            assert await asyncio.to_thread(cluster.deploy) == ["a: unchanged", "b: created"]
            async for output in stream:
                tokens += output.token_ids
            assert tokens == plain

    asyncio.run(run())
    after = cluster.has()
    assert after["a"] == before["a"]
    assert min(after["b"].values()) > max(before["b"].values())
    cluster.file.write_text(cluster.file.read_text().partition("b:\n")[0])
    assert cluster.deploy() == [
        "a: unchanged",
        f"left as they are: b (not in {cluster.file}; `quire delete` ends one)",
    ]
    cluster.write()
    assert cluster.quire("delete", "none").returncode == 1


_LEFT = """
import ray, sys
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
groups = ray.util.placement_group_table().values()
print([group["name"] for group in groups if group["state"] != "REMOVED"], ray.util.list_named_actors(True))
"""


def test_the_end(cluster: Cluster) -> None:
    """Nothing is left in the Ray cluster, not even of what was about to end. What is said meanwhile is refused, as it
    would be forgotten."""
    cluster.has()
    assert cluster.quire("scale", "a", "1").returncode == 0
    [gateway] = cluster.head.pids("GatewayActor")
    os.kill(gateway, signal.SIGSTOP)  # so that the end takes a while
    ending = subprocess.Popen(
        [sys.executable, "-m", "quire.cli.main", "shutdown"],
        env=cluster.head.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: "is shutting down" in cluster.quire("scale", "a", "2").stderr)
        for late in (cluster.quire("deploy", str(cluster.file)), cluster.head.start()):
            assert (late.returncode, "is shutting down" in late.stderr) == (1, True), late.stderr
    finally:
        os.kill(gateway, signal.SIGCONT)
        stdout, stderr = ending.communicate(timeout=LIMIT)
    assert ending.returncode == 0, stderr
    assert "the cluster has ended" in stdout
    assert not cluster.head.file.exists()
    wait_until(lambda: not cluster.head.pids(*ACTORS))
    left = subprocess.run(
        [sys.executable, "-c", _LEFT, f"127.0.0.1:{cluster.head.ray_port}"],
        env=cluster.head.environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert left.stdout == "[] []\n", left.stderr
    nobody = cluster.quire("status")
    assert nobody.returncode == 1
    assert "no cluster is known here" in nobody.stderr
    assert cluster.head.process.poll() is None
