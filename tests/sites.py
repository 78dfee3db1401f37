"""A web server that says anything, and names that lead anywhere: what the fetching of pictures is tested against."""

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from pictures import noise, saved
from quire_cluster.config import MediaConfig
from quire_cluster.gateway.media import Media
from quire_engine.errors import InvalidParameter
from quire_engine.multimodal.pictures import PictureLimits

WHAT = "image_url of part 1 of message 0"
PICTURE = saved(noise(40, 30), "PNG")
LIMITS = PictureLimits(max_bytes=100_000)

Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


def answer(status: str, *headers: str, body: bytes = b"") -> bytes:
    lines = [f"HTTP/1.1 {status}", *headers, "Connection: close", "", ""]
    return "\r\n".join(lines).encode() + body


def ok(*headers: str, body: bytes = PICTURE) -> bytes:
    return answer("200 OK", f"Content-Length: {len(body)}", *headers, body=body)


def to(location: str, status: str = "302 Found") -> bytes:
    return answer(status, f"Location: {location}", "Content-Length: 5", body=b"there")


class Site:
    """A server on 127.0.0.1 that answers each path as it is told."""

    def __init__(self, answers: dict[str, bytes | Answer], tls: ssl.SSLContext | None = None) -> None:
        self.answers = answers
        self.requests: list[str] = []
        self.connections = self.open = 0
        self._tls = tls

    async def __aenter__(self) -> "Site":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        try:
            request = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.requests.append(request)
            said = self.answers[request.split(" ")[1]]
            if isinstance(said, bytes):
                writer.write(said)
                await writer.drain()
            else:
                await said(writer)
            await asyncio.sleep(0.01)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client left, or the test ends
        finally:
            self.open -= 1
            writer.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def paths(self) -> list[str]:
        return [request.split(" ")[1] for request in self.requests]


def names(known: dict[str, list[str]], asked: list[str] | None = None) -> Callable[[str, int], Awaitable[list[str]]]:
    """A resolver."""

    async def resolve(name: str, port: int) -> list[str]:
        if asked is not None:
            asked.append(name)
        if name not in known:
            raise OSError("no such name")
        return known[name]

    return resolve


async def fetched(
    site: Site, url: str, *, domains: str | None = None, limits: PictureLimits = LIMITS, **options: Any
) -> bytes:
    """From `url`, where PORT is the site's. The site's address is allowed unless `domains` says otherwise."""
    domains = "127.0.0.1:PORT" if domains is None else domains
    config = MediaConfig(allowed_media_domains=domains.replace("PORT", str(site.port)) or None)
    media = Media(config, limits, **options)
    try:
        return await media.read(url.replace("PORT", str(site.port)), WHAT)
    finally:
        await media.close()


def refusal(answers: dict[str, bytes | Answer], url: str, **options: Any) -> tuple[str, Site]:
    """What is said, and the site afterwards."""

    async def run() -> tuple[str, Site]:
        async with Site(answers) as site:
            with pytest.raises(InvalidParameter) as refused:
                await fetched(site, url, **options)
            assert refused.value.parameter == "messages"
            return str(refused.value), site

    said, site = asyncio.run(run())
    assert said.startswith(f"{WHAT}: ")
    assert len(said) < 400
    return said, site
