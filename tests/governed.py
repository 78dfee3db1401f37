"""A gateway that governs, over fake replicas: all that `quire serve --governance` has, but for Ray and models."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from fake_replica import FakeReplica
from gateways import until
from quire_cluster.access import prepare_access
from quire_cluster.config import GatewayConfig
from quire_cluster.deployment import Deployment, DeploymentConfig
from quire_cluster.gateway.process import Gateway
from quire_cluster.gateway.service import Service
from quire_cluster.governance.administration import Actor, Administration
from quire_cluster.governance.callers import TenantConfig
from quire_cluster.governance.config import Governance
from quire_cluster.governance.governor import Governor
from quire_cluster.routing_table import ClusterTable, RoutingTable, Served
from quire_engine.config import EngineConfig

TEST = Actor(key="operator:test")


@dataclass
class Governed:
    """What a test needs of it."""

    gateway: Gateway
    governor: Governor
    replicas: dict[str, FakeReplica]
    client: httpx.AsyncClient

    @property
    def administration(self) -> Administration:
        return self.governor.administration

    @property
    def address(self) -> str:
        """Of gRPC."""
        return f"127.0.0.1:{self.gateway.grpc_port}"

    async def tenant(self, name: str, **options: Any) -> None:
        await self.administration.add_tenant(TenantConfig(**options).tenant(name), TEST)

    async def key(self, tenant: str, **options: Any) -> str:
        """A new one, which the gateway knows."""
        _, key = await self.administration.create_key(tenant, TEST, **options)
        await self.governor.directory.look()
        return key


def bearer(key: str | None) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"} if key is not None else {}


@asynccontextmanager
async def governed(
    folder: Path, service: Callable[[], Service], *, models: tuple[str, ...] = ("tiny",), text: str = "", **options: Any
) -> AsyncIterator[Governed]:
    """`text`: governance.yaml. `options`: of the gateway."""
    file = folder / "governance.yaml"
    if not file.exists():
        file.write_text(text)
    config = GatewayConfig(port=0, grpc_port=0, governance=str(file), **options)
    access = await prepare_access(config, {})
    assert isinstance(access, Governance)
    gateway = Gateway(config, access, name="test")
    gateway.open()
    await gateway.start()
    assert gateway._governor is not None
    replicas, served, read = {}, [], []
    for name in models:
        one = service()
        one.names = [name]
        replicas[name] = await FakeReplica().start()
        deployment = Deployment(name, EngineConfig(model="none"), DeploymentConfig())
        served.append(Served(deployment, RoutingTable((replicas[name].entry(),))))
        read.append(one)
    gateway.models.follow(ClusterTable(1, tuple(served)), read)
    await until(lambda: gateway.models.replicas == len(models))
    gateway.models.look()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{gateway.http_port}", trust_env=False) as client:
        try:
            async with asyncio.timeout(120):
                yield Governed(gateway, gateway._governor, replicas, client)
        finally:
            await gateway.drain(0)
            await gateway.stop()
            await asyncio.gather(*(replica.stop() for replica in replicas.values()))
