"""A cluster that governs, with three gateways on one port, started as operators start one."""

import asyncio
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from conftest import wait_until
from quire.cli.config import AdminConfig
from quire.cli.operate import Control
from quire_cluster.governance.administration import Actor, Administration
from quire_cluster.governance.callers import TenantConfig
from quire_cluster.governance.chain import AuditLog
from quire_cluster.governance.config import read_governance
from quire_cluster.governance.database import Database
from quire_protos.v1 import control_pb2 as pb
from ray_head import Head, ray_head
from web import LIMIT

T = TypeVar("T")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
GATEWAYS = 3
A_MINUTE, AT_A_TIME = 60, 12
TEMPLATE = "{{ messages[0].content }}"


class Governed:
    """Its head, the folder of its governance.yaml, and what an operator types there."""

    def __init__(self, head: Head, folder: Path, model: Path) -> None:
        self.head, self._folder = head, folder
        self.url = f"http://127.0.0.1:{head.http}"
        (folder / "governance.yaml").write_text("")
        started = head.start(gateways=GATEWAYS, governance=folder / "governance.yaml")
        assert started.returncode == 0, started.stderr
        (folder / "template").write_text(TEMPLATE)
        (folder / "models.yaml").write_text(
            f"tiny:\n  model: {model}\n  chat-template: template\n  max-num-seqs: 32\n"
            "  cpu-threads: 1\n  kv-cache-memory-bytes: 4194304\n"
        )
        self.keys = self._on_database(self._add_tenants)
        deployed = head.quire("deploy", str(folder / "models.yaml"))
        assert deployed.returncode == 0, deployed.stderr
        wait_until(lambda: all(self.answers(key) for key in self.keys.values() for _ in range(4 * GATEWAYS)), LIMIT)
        wait_until(lambda: [one.phase for one in self.deployment().replicas] == ["serving"], LIMIT)

    def _on_database(self, work: Callable[[Database, AuditLog], Coroutine[Any, Any, T]]) -> T:
        """As an operator's commands do it, without the time that it takes to start one."""

        async def run() -> T:
            governance = read_governance(self._folder / "governance.yaml")
            database = Database(governance.database)
            try:
                return await work(database, AuditLog(database, governance.signing_key))
            finally:
                await database.close()

        return asyncio.run(run())

    async def _add_tenants(self, database: Database, log: AuditLog) -> dict[str, str]:
        administration, operator = Administration(database, log), Actor(key="operator:test")
        tenants = {
            "narrow": TenantConfig(concurrent_requests=AT_A_TIME),
            "slow": TenantConfig(requests_per_minute=A_MINUTE),
            "calm": TenantConfig(),
        }
        for name, one in tenants.items():
            await administration.add_tenant(one.tenant(name), operator)
        return {name: (await administration.create_key(name, operator))[1] for name in tenants}

    def answers(self, key: str) -> bool:
        """Whether a gateway knows the key: any of them, by a new connection."""
        with httpx.Client(trust_env=False) as client:
            return client.get(f"{self.url}/v1/models", headers={"x-api-key": key}).status_code == 200

    def deployment(self) -> pb.DeploymentStatus:
        key = json.loads(self.head.file.read_text())["key"]
        with Control(AdminConfig(admin_address=f"127.0.0.1:{self.head.admin_grpc}", admin_key=key)) as control:
            [found] = control.call("Status", pb.StatusRequest()).deployments
            assert isinstance(found, pb.DeploymentStatus)
            return found

    def records(self, kind: str) -> list[dict[str, Any]]:
        """The newest first, of a log that is intact."""

        async def read(database: Database, log: AuditLog) -> list[dict[str, Any]]:
            assert (await log.verify()).fault is None
            return [entry.values for entry in await log.list(kind=kind, limit=10000)]

        return self._on_database(read)


@pytest.fixture(scope="module")
def governed(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str], Path]) -> Iterator[Governed]:
    with ray_head(tmp_path_factory.mktemp("home")) as head:
        yield Governed(head, tmp_path_factory.mktemp("governance"), checkpoint("llama"))


async def ask(url: str, key: str, name: str, tokens: int) -> int:
    """A streamed request over a connection of its own: its status, once all of its answer is there; 0: it broke off."""
    body = {"model": "tiny", "prompt": "w5 w6", "max_tokens": tokens, "ignore_eos": True}
    try:
        async with httpx.AsyncClient(trust_env=False, timeout=LIMIT) as client:
            answer = await client.post(
                f"{url}/v1/completions",
                json=body | {"stream": True, "request_id": name},
                headers={"x-api-key": key, "connection": "close"},
            )
    except httpx.TransportError:
        return 0
    return answer.status_code if answer.status_code != 200 or "[DONE]" in answer.text else 0


def test_limits_hold_over_all_gateways(governed: Governed) -> None:
    """500 requests at once of one tenant, and then of another. The machine is busy: a gateway that hears of the
    controller too late may use its share beside what the others hold."""
    more = 1 + (GATEWAYS - 1) / GATEWAYS
    running: list[int] = []
    over = asyncio.Event()

    async def watch() -> None:
        while not over.is_set():
            found = await asyncio.to_thread(governed.deployment)
            running.append(sum(one.running + one.waiting for one in found.replicas))

    async def burst(tenant: str) -> Counter[int]:
        asked = (ask(governed.url, governed.keys[tenant], f"{tenant}-{number}", 24) for number in range(500))
        return Counter(await asyncio.gather(*asked))

    async def watched(tenant: str) -> Counter[int]:
        watching = asyncio.ensure_future(watch())
        try:
            return await burst(tenant)
        finally:
            over.set()
            await watching

    narrow = asyncio.run(watched("narrow"))
    begun = time.monotonic()
    slow = asyncio.run(burst("slow"))
    most = more * A_MINUTE * (1 + (time.monotonic() - begun) / 60)
    print(f"narrow: {narrow}, {max(running)} at a time; slow: {slow}, at most {most:.0f}")
    assert narrow.keys() | slow.keys() <= {200, 429}
    assert narrow[200] >= AT_A_TIME
    assert max(running) <= more * AT_A_TIME
    assert A_MINUTE / GATEWAYS <= slow[200] <= most
    wait_until(lambda: len(governed.records("refused")) == narrow[429] + slow[429], LIMIT)
    assert len(governed.records("request")) == narrow[200] + slow[200]
    assert {one["refused"] for one in governed.records("refused")} == {"LimitReached"}


def test_a_gateway_that_is_killed_takes_no_record_with_it(governed: Governed) -> None:
    """Another one of its host brings them to the database."""
    gateways = governed.head.pids("GatewayActor")
    assert len(gateways) == GATEWAYS

    async def run() -> list[int]:
        asked = [
            asyncio.ensure_future(ask(governed.url, governed.keys["calm"], f"calm-{number}", 2 + number % 30))
            for number in range(120)
        ]
        while sum(one.done() for one in asked) < 40:
            await asyncio.sleep(0.01)
        os.kill(gateways[0], signal.SIGKILL)
        return await asyncio.gather(*asked)

    statuses = asyncio.run(run())
    assert set(statuses) <= {200, 0}
    told = {f"calm-{number}" for number, status in enumerate(statuses) if status == 200}
    assert len(told) >= 40

    def on_record() -> list[str]:
        return [one["request_id"] for one in governed.records("request") if one["tenant"] == "calm"]

    wait_until(lambda: told <= set(on_record()), LIMIT)
    assert set(Counter(on_record()).values()) == {1}


def test_what_operators_do_is_on_record(governed: Governed) -> None:
    """What they ask of the cluster, and of tenants and keys, to the cluster's end."""
    assert governed.head.quire("scale", "tiny", "1").returncode == 0
    assert governed.head.quire("status").returncode == 0
    stopped = governed.head.quire("shutdown")
    assert stopped.returncode == 0, stopped.stderr
    found = governed.records("admin")[::-1]
    actions = [one["action"] for one in found]
    assert actions[:6] == 3 * ["tenant.add"] + 3 * ["key.create"]
    assert actions[6:] == ["cluster.deploy", "cluster.scale", "cluster.shutdown"]
    assert {one["key"] for one in found[6:]} == {"operator"}
    assert {one["address"] for one in found[6:]} == {"127.0.0.1"}
    [asked] = found[6]["asked"]["deployments"]
    assert asked["name"] == "tiny"
    assert asked["options"]["max_num_seqs"] == 32
    assert TEMPLATE not in json.dumps(found), "a template is known by its digest"
    assert asked["chat_template"].startswith("sha256:")
    assert found[7]["asked"] == {"name": "tiny", "replicas": 1}
