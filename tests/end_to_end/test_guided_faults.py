"""Processes are killed while answers are guided, reasoned and call tools: each is the same to its readers."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import RunningServer, processes, wait_until
from conversations import MODEL, Conversation, Told, conversations, same, talking_checkpoint
from quire import AsyncClient
from quire_engine.config import EngineConfig
from quire_engine.text.tokenizer import Tokenizer
from quire_engine.weights.resolve import find_model
from web import LIMIT, http

CONVERSATIONS = conversations(32)


async def events(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """As server-sent events are defined: `aiter_lines` ends lines within JSON, too, at U+2028 and its like."""
    rest = b""
    async for piece in answer.aiter_bytes():
        *whole, rest = (rest + piece).split(b"\n\n")
        for one in whole:
            if one != b"data: [DONE]":
                event = json.loads(one.removeprefix(b"data: "))
                assert "error" not in event, event
                yield event
    assert not rest


class Readers:
    """Of all conversations at a time, half of them over gRPC, half over HTTP."""

    def __init__(self, folder: Path, url: str, grpc: str) -> None:
        self._tokenizer = Tokenizer.load(find_model(EngineConfig(model=str(folder))))
        self._url, self._grpc = url, grpc

    def read(self, disturb: Callable[[], None] | None = None) -> list[list[Told]]:
        """Their answers. `disturb` runs once all have begun."""
        return asyncio.run(self._read(disturb))

    async def _read(self, disturb: Callable[[], None] | None) -> list[list[Told]]:
        begun = asyncio.Barrier(len(CONVERSATIONS) + 1)
        async with AsyncClient(self._grpc) as client, httpx.AsyncClient(base_url=self._url, timeout=LIMIT) as web:
            streams = [
                asyncio.ensure_future(
                    self._over_http(web, one, begun) if one.number % 2 else self._over_grpc(client, one, begun)
                )
                for one in CONVERSATIONS
            ]
            await begun.wait()
            if disturb is not None:
                disturb()
            return await asyncio.gather(*streams)

    async def _over_grpc(self, client: AsyncClient, one: Conversation, begun: asyncio.Barrier) -> list[Told]:
        told, first = one.unread(), True
        options = one.options(self._tokenizer)
        async for delta in client.stream_chat(one.messages, model=MODEL, timeout=LIMIT, **options):
            told[delta.index].add(delta)
            if first:
                first = False
                await begun.wait()
        return told

    async def _over_http(self, web: httpx.AsyncClient, one: Conversation, begun: asyncio.Barrier) -> list[Told]:
        told, first = one.unread(), True
        async with web.stream("POST", "/v1/chat/completions", json=one.body(self._tokenizer)) as answer:
            assert answer.status_code == 200, await answer.aread()
            async for event in events(answer):
                [choice] = event["choices"]
                told[choice["index"]].add_event(choice)
                if first and choice.get("token_ids"):
                    first = False
                    await begun.wait()
        return told


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talking_checkpoint(tmp_path_factory.mktemp("talker"))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RunningServer]:
    made = RunningServer(str(folder), "-dp", "2", "--served-model-name", MODEL, "--max-num-seqs", "32")
    yield made
    assert made.stop() == 0, made.log


@pytest.fixture(scope="module")
def readers(server: RunningServer, folder: Path) -> Readers:
    wait_until(lambda: http.get(f"{server.url}/ready").json().get("replicas") == 2)
    return Readers(folder, server.url, server.grpc)


@pytest.fixture(scope="module")
def undisturbed(readers: Readers) -> list[list[Told]]:
    """What every run must give: it is what was asked for, and has something of all there is."""
    told = readers.read()
    for one, answer in zip(CONVERSATIONS, told, strict=True):
        one.check(answer)
    choices = [choice for answer in told for choice in answer]
    assert sum(len(choice.calls) > 0 for choice in choices) >= 6
    assert sum(choice.reasoning != "" for choice in choices) >= 12
    assert sum(choice.content != "" for choice in choices) >= 12
    assert {choice.finish_reason for choice in choices} == {"stop", "tool_calls", "length"}
    return told


@pytest.mark.parametrize("kind", ["Worker", "Replica"])
def test_a_killed_process_changes_nothing_that_is_read(
    server: RunningServer, readers: Readers, undisturbed: list[list[Told]], kind: str
) -> None:
    wait_until(lambda: len(processes(server, kind)) == 2)
    [victim, _] = processes(server, kind)
    moved = server.log.count("go on elsewhere")
    same(readers.read(lambda: os.kill(victim, signal.SIGKILL)), undisturbed)
    assert server.log.count("go on elsewhere") > moved
    wait_until(lambda: http.get(f"{server.url}/ready").json().get("replicas") == 2)
    assert len({victim} & set(processes(server, kind))) == 0
