"""A bug in a grammar ends its request at a replica, and nothing else there."""

import asyncio
import inspect
import os
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from conversations import MODEL, conversations
from gateways import models_of, until
from quire_cluster.gateway.http import Api
from quire_cluster.gateway.service import Service
from quire_cluster.observability.metrics import Metrics
from quire_cluster.replica import EngineService, EngineThread, session_server
from quire_cluster.routing_table import ReplicaEntry, RoutingTable
from quire_engine.config import EngineConfig
from quire_engine.errors import QuireError
from quire_engine.execution.runner import ModelRunner
from quire_engine.guidance.cursor import Cursor
from quire_engine.weights.resolve import find_model

NEIGHBOURS = conversations(12, tokens=100)
BUG = {"regex": "[a-z]{60}"}


class Runner(ModelRunner):
    """As workers are to a replica."""

    failure = None


class Replica:
    """In this process, behind a gateway. Runs in several event loops, one after the other."""

    def __init__(self, folder: Path) -> None:
        self._config = EngineConfig(model=str(folder), device="cpu", kv_cache_memory_bytes=16 << 20)
        self._files = find_model(self._config)
        self._runner = Runner(self._config, self._files, threads=1)
        self.failures: list[QuireError] = []

    @asynccontextmanager
    async def served(self) -> AsyncIterator[tuple[Service, httpx.AsyncClient]]:
        workers: Any = self._runner
        engine = EngineThread(workers, asyncio.get_running_loop(), self.failures.append)
        server = session_server(EngineService(engine), "secret")
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        engine.start()
        service = Service.load(self._files, self._config, names=[MODEL], chat_template=None, metrics=Metrics())
        entry = ReplicaEntry(0, 1, f"127.0.0.1:{port}", engine.max_model_len, 0.0, secret="secret")
        service.dispatcher.update_table(RoutingTable((entry,)))
        await until(lambda: service.ready)
        transport = httpx.ASGITransport(Api(models_of(service)).app())
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://gateway", timeout=300) as client:
                yield service, client
        finally:
            await service.dispatcher.close()
            await server.stop(0)
            engine.stop()


@pytest.fixture(scope="module")
def replica(talking_folder: Path) -> Iterator[Replica]:
    made = Replica(talking_folder)
    yield made
    assert not made.failures
    torch.set_num_threads(len(os.sched_getaffinity(0)))


async def asked(client: httpx.AsyncClient, body: dict[str, Any]) -> Any:
    """The choices, without the ids of their calls; of a failure its status and its text."""
    answer = await client.post("/v1/chat/completions", json=body | {"stream": False})
    if answer.status_code != 200:
        return answer.status_code, answer.text
    choices = answer.json()["choices"]
    for choice in choices:
        for call in choice["message"].get("tool_calls", ()):
            del call["id"]
    return choices


async def answers(service: Service, client: httpx.AsyncClient, *others: dict[str, Any]) -> list[Any]:
    """Of the neighbours, and of `others` beside them."""
    bodies = [one.body(service.tokenizer) for one in NEIGHBOURS]
    for body in bodies:  # which differ in their last digits, by what else is in a step
        body.pop("logprobs", None), body.pop("top_logprobs", None)
    return await asyncio.gather(*(asked(client, body) for body in (*bodies, *others)))


@pytest.mark.parametrize("part", ["advance", "matcher", "complete", "besides"])
def test_a_cursor_that_raises_ends_its_request_alone(
    replica: Replica, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = Counter[int]()
    works: Any = inspect.getattr_static(Cursor, part)

    def fails(cursor: Cursor, *arguments: int) -> Any:
        if "[a-z]{60}" in cursor.guide.spec.content:
            begun[id(cursor)] += 1
            if begun[id(cursor)] > 5:
                raise RuntimeError("a bug")
        return works.fget(cursor) if isinstance(works, property) else works(cursor, *arguments)

    bad = {"model": MODEL, "messages": NEIGHBOURS[0].messages, "structured_outputs": BUG, "max_tokens": 90}
    bad |= {"chat_template_kwargs": {"thinking": "closed"}}

    async def run() -> None:
        async with replica.served() as (service, client):
            undisturbed = await answers(service, client)
            assert all(isinstance(one, list) for one in undisturbed), undisturbed
            monkeypatch.setattr(Cursor, part, property(fails) if isinstance(works, property) else fails)
            *found, first, second = await answers(service, client, bad, bad | {"seed": 1})
            assert found == undisturbed
            for status, text in (first, second):
                assert (status, "internal error, which is in the server's log" in text) == (500, True), text
            monkeypatch.undo()
            [*found, good] = await answers(service, client, bad)
            assert found == undisturbed
            assert len(good[0]["message"]["content"].strip()) == 60

    asyncio.run(run())
