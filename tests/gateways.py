"""Gateways over fake replicas: over real sockets, without a model."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
from fake_replica import FakeReplica, token_at
from quire_cluster.deployment import Deployment, DeploymentConfig
from quire_cluster.gateway.dispatcher import Dispatcher
from quire_cluster.gateway.generation import Generation, RequestFacts
from quire_cluster.gateway.http import Api
from quire_cluster.gateway.models import Models
from quire_cluster.gateway.service import Service
from quire_cluster.policies.suspicion import Patience
from quire_cluster.routing_table import ClusterTable, Key, RoutingTable, Served
from quire_engine.config import EngineConfig
from quire_engine.request import EngineSampling
from quire_engine.text.output import OutputText
from quire_engine.text.params import SamplingParams
from quire_engine.text.tokenizer import Tokenizer

TOKENS = 30
PROMPTS = [[5 + number, 17, 30] for number in range(16)]
LONG = Patience()
SHORT = Patience(avoid=0.5, move=1.0)


class Gateway:
    """A dispatcher over fake replicas."""

    def __init__(self, tokenizer: Tokenizer, replicas: list[FakeReplica], patience: Patience, max_waiting: int) -> None:
        self.dispatcher = Dispatcher(lambda s: None, lambda n: None, max_waiting=max_waiting, patience=patience)
        self.replicas = replicas
        self.silent: list[Key] = []
        self.dispatcher.on_silence = self.silent.append
        self._tokenizer = tokenizer
        self._version = 0
        self._started = 0

    def table(self, *replicas: FakeReplica, load_seconds: float = 0.0) -> None:
        """What the controller says is there."""
        self._version += 1
        entries = tuple(replica.entry(load_seconds=load_seconds) for replica in replicas)
        self.dispatcher.update_table(RoutingTable(entries))

    def start(self, prompt: list[int], n: int = 1, *, deadline: float = 0.0, **sampling: Any) -> Generation:
        """Sends a request off."""
        self._started += 1
        facts = RequestFacts(f"request-{self._started}", prompt, 0, deadline, b"", time.monotonic())
        asked = EngineSampling(**({"max_tokens": TOKENS} | sampling))
        texts = [OutputText(self._tokenizer, SamplingParams(), prompt) for _ in range(n)]
        generation = Generation(facts, [asked] * n, texts)
        self.dispatcher.submit(generation)
        return generation


@asynccontextmanager
async def gateway(
    tokenizer: Tokenizer, count: int = 2, *, patience: Patience = LONG, max_waiting: int = 8, **options: Any
) -> AsyncIterator[Gateway]:
    replicas = [await FakeReplica(**options).start() for _ in range(count)]
    made = Gateway(tokenizer, replicas, patience, max_waiting)
    made.table(*replicas)
    await until(lambda: len(made.dispatcher.sessions) == count)
    try:
        yield made
    finally:
        await made.dispatcher.close()
        await asyncio.gather(*(replica.stop() for replica in replicas))


async def until(condition: Callable[[], bool], limit: float = 300.0) -> None:
    async with asyncio.timeout(limit):
        while not condition():
            await asyncio.sleep(0.005)


async def tokens(generation: Generation) -> list[int]:
    """Of its first choice. Raises what it ended with."""
    async with asyncio.timeout(300):
        while await generation.deltas():
            pass
    for choice in generation.choices:
        if choice.error is not None:
            raise choice.error
    return generation.choices[0].output


def expected(prompt: list[int]) -> list[int]:
    return [token_at(prompt, index) for index in range(TOKENS)]


def models_of(service: Service) -> Models:
    """A gateway's models: this one alone, with the replicas that it has."""
    models = Models(service.metrics.all)
    table = RoutingTable(tuple(session.entry for session in service.dispatcher.sessions))
    deployment = Deployment(service.names[0], EngineConfig(model="none"), DeploymentConfig())
    models.follow(ClusterTable(1, (Served(deployment, table),)), [service])
    return models


@asynccontextmanager
async def http(service: Service, **options: Any) -> AsyncIterator[tuple[httpx.AsyncClient, FakeReplica]]:
    replica = await FakeReplica(**options).start()
    app = Api(models_of(service)).app()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        assert (await client.get("/health")).status_code == 200, "it is starting"
        assert (await client.get("/ready")).status_code == 503
        service.dispatcher.update_table(RoutingTable((replica.entry(),)))
        await until(lambda: service.ready)
        try:
            async with asyncio.timeout(120):
                yield client, replica
        finally:
            await service.dispatcher.close()
            await replica.stop()


def body(prompt: Any, *, stream: bool) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": TOKENS, "stream": stream}
