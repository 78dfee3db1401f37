"""Clocks and limits of HTTP connections, so short that a test can wait for them."""

import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from quire_cluster.gateway.connection import HttpConfig, HttpServer, Limits
from quire_cluster.gateway.doors import Doors
from quire_cluster.governance.identity import SharedKeys
from quire_cluster.keys import Keys
from starlette.types import Receive, Scope, Send

HEAD = b"POST / HTTP/1.1\r\nHost: localhost\r\n"
KEY = b"Authorization: Bearer key\r\n"
LINES = 30


async def _stream(scope: Scope, receive: Receive, send: Send) -> None:
    """Reads the body, and then answers for longer than any of the limits."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(LINES):
        await send({"type": "http.response.body", "body": b"line\n", "more_body": True})
        await asyncio.sleep(0.1)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


@asynccontextmanager
async def connection(
    head: float = 1.0, body: float = 1.0
) -> AsyncIterator[tuple[HttpServer, asyncio.StreamReader, asyncio.StreamWriter]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        doors = Doors.of("127.0.0.1", SharedKeys(Keys(["key"])), (), ())
        config = HttpConfig(doors.before(_stream), Limits(connections=10, head=head, body=body, write=60.0))
        config.timeout_keep_alive = 1
        server = HttpServer(config)
        serving = asyncio.ensure_future(server.serve(sockets=[listener]))
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        try:
            async with asyncio.timeout(60):
                yield server, reader, writer
        finally:
            writer.close()
            server.should_exit = True
            await serving


def test_a_body_that_comes_after_its_refusal_leaves_no_connection_open() -> None:
    async def run() -> None:
        async with connection() as (server, reader, writer):
            writer.write(HEAD + b"Content-Length: 4\r\n\r\nab")
            await reader.readuntil(b"}}")
            writer.write(b"cd")
            assert await reader.read() == b"", "it is hung up on"
            while server.server_state.connections:
                await asyncio.sleep(0.01)

    asyncio.run(run())


def test_a_head_without_end_is_too_long_before_it_is_late() -> None:
    async def run() -> None:
        async with connection(head=1000.0) as (_, reader, writer):
            writer.write(HEAD + b"x: " + b"y" * 66_000)
            assert (await reader.read()).startswith(b"HTTP/1.1 431")

    asyncio.run(run())


@pytest.mark.parametrize("key", [KEY, b""])
@pytest.mark.parametrize("endless", [b"x: y\r\n", b"y", b""])
def test_what_follows_a_body_without_end_is_too_long_before_it_is_late(key: bytes, endless: bytes) -> None:
    """Trailers, one trailer, the extension of a chunk: where the request was refused, nothing more is said."""

    async def run() -> None:
        async with connection(body=1000.0) as (server, reader, writer):
            begun = b"2\r\nab\r\n" + (b"0\r\nx: " if endless else b"1;")
            writer.write(HEAD + key + b"Transfer-Encoding: chunked\r\n\r\n" + begun)
            while not any(one._body_since for one in server.server_state.connections):
                await asyncio.sleep(0.01)
            if not key:
                await reader.readuntil(b"}}")
            writer.write(((endless or b"y") * 66_000)[:66_000])
            assert (await reader.read()).startswith(b"HTTP/1.1 431" if key else b"")

    asyncio.run(run())


def test_heads_in_a_row_are_not_taken_for_what_follows_a_body() -> None:
    async def run() -> None:
        async with connection(body=1000.0) as (_, reader, writer):
            one = HEAD.replace(b"POST", b"GET") + b"x: " + b"y" * 3000 + b"\r\n\r\n"
            for row in (one, one * 30 + HEAD + b"Content-Length: 2\r\n\r\n"):
                writer.write(row)
                for _ in range(row.count(b"HTTP/1.1")):
                    assert (await reader.readuntil(b"}}")).startswith(b"HTTP/1.1 401")

    asyncio.run(run())


def test_a_blank_line_after_a_request_ends_no_answer() -> None:
    async def run() -> None:
        async with connection() as (_, reader, writer):
            writer.write(HEAD + KEY + b"Content-Length: 2\r\n\r\nab")
            await reader.readuntil(b"line")
            writer.write(b"\r\n")
            answer = await reader.readuntil(b"0\r\n\r\n")
            assert answer.count(b"line") == LINES - 1
            assert await reader.read() == b"", "and then it is idle"

    asyncio.run(run())


def test_a_body_that_is_not_read_yet_is_not_late() -> None:
    """Of a request that waits for the answer to the one before it."""

    async def run() -> None:
        async with connection() as (_, reader, writer):
            body = bytes(1 << 20)
            writer.write(HEAD + KEY + b"Content-Length: 2\r\n\r\nab")
            await reader.readuntil(b"line")
            writer.write(HEAD + KEY + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            for lines in (LINES - 1, LINES):
                assert (await reader.readuntil(b"0\r\n\r\n")).count(b"line") == lines

    asyncio.run(run())


def test_open_files_are_shared_by_both_ways_in() -> None:
    """HTTP and gRPC take as many connections each."""
    script = (
        "import resource\n"
        "from quire_cluster.gateway.connection import raise_open_files\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (512, 1024))\n"
        "print(raise_open_files(4096), raise_open_files(9), *resource.getrlimit(resource.RLIMIT_NOFILE))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    connections, few, soft, hard = map(int, done.stdout.split())
    assert 2 * connections < soft == hard == 1024
    assert few == 9
