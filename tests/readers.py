"""Clients that read the streams of many conversations at a time."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
from conversations import MODEL, Conversation, Told
from quire import AsyncClient
from quire_engine.config import EngineConfig
from quire_engine.text.tokenizer import Tokenizer
from quire_engine.weights.resolve import find_model
from web import LIMIT


async def events(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in answer.aiter_lines():
        if line and line != "data: [DONE]":
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            yield event


class Readers:
    """Of all conversations at a time, half of them over HTTP, where that is wanted; the others over gRPC."""

    def __init__(self, folder: Path, conversations: Sequence[Conversation], urls: Sequence[str], grpc: str) -> None:
        """`urls`: of gateways' HTTP; `grpc`: addresses, as the client takes them."""
        self._tokenizer = Tokenizer.load(find_model(EngineConfig(model=str(folder))))
        self._conversations = conversations
        self._urls, self._grpc = urls, grpc

    def read(self, disturb: Callable[[], None] | None = None, *, over_http: bool = True) -> list[list[Told]]:
        """Their answers. `disturb` runs once all have begun."""
        return asyncio.run(self._read(disturb, over_http))

    def read_during(self, act: Callable[[], None]) -> list[list[list[Told]]]:
        """Their answers, again and again for as long as something takes, and once more."""

        async def run() -> list[list[list[Told]]]:
            acting = asyncio.ensure_future(asyncio.to_thread(act))
            rounds = []
            while not acting.done():
                rounds.append(await self._read(None, over_http=True))
            await acting
            return [*rounds, await self._read(None, over_http=True)]

        return asyncio.run(run())

    async def _read(self, disturb: Callable[[], None] | None, over_http: bool) -> list[list[Told]]:
        begun = asyncio.Barrier(len(self._conversations) + 1)
        async with AsyncClient(self._grpc) as client, httpx.AsyncClient(timeout=LIMIT) as web:
            streams = [
                asyncio.ensure_future(
                    self._over_http(web, one, begun)
                    if over_http and one.number % 2
                    else self._over_grpc(client, one, begun)
                )
                for one in self._conversations
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
        url = self._urls[one.number // 2 % len(self._urls)]
        async with web.stream("POST", f"{url}/v1/chat/completions", json=one.body(self._tokenizer)) as answer:
            assert answer.status_code == 200, await answer.aread()
            async for event in events(answer):
                [choice] = event["choices"]
                told[choice["index"]].add_event(choice)
                if first and choice.get("token_ids"):
                    first = False
                    await begun.wait()
        return told
