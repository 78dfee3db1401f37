"""HAProxy, nginx and Envoy as they are configured, in front of gateways that are not real."""

import asyncio
import contextlib
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from load_balancers import RunningBalancer, StubGateway, program
from quire_cluster.load_balancer import KINDS, GatewayAddress, Listens, configuration
from web import LIMIT


@contextlib.asynccontextmanager
async def balanced(
    kind: str, folder: Path, *names: str
) -> AsyncIterator[tuple[list[StubGateway], httpx.AsyncClient, RunningBalancer]]:
    stubs = [StubGateway(name) for name in names]
    gateways = [await stub.start() for stub in stubs]
    balancer = await asyncio.to_thread(RunningBalancer, kind, folder, gateways)
    try:
        if kind != "nginx":  # which has no checks; they end in the first second
            while not all(stub.checks for stub in stubs):
                await asyncio.sleep(0.05)
        async with httpx.AsyncClient(base_url=balancer.url, timeout=LIMIT) as client:
            yield stubs, client, balancer
    finally:
        await asyncio.to_thread(balancer.stop)
        for stub in stubs:
            stub.stop()


@pytest.mark.parametrize("kind", KINDS)
def test_both_are_asked_and_hear_who_asks(kind: str, tmp_path: Path) -> None:
    async def run() -> None:
        async with balanced(kind, tmp_path, "a", "b") as (_, client, _):
            answers = [(await client.post("/v1/completions", content=b"x" * 1000)).json() for _ in range(20)]
            assert {answer["by"] for answer in answers} == {"a", "b"}
            [forwarded] = {answer["headers"]["x-forwarded-for"] for answer in answers}
            assert forwarded == "127.0.0.1" or kind == "envoy"  # which writes this machine's address for loopback's

    asyncio.run(run())


@pytest.mark.parametrize("mood", ["dies", "drains"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_got_no_answer_is_asked_of_another(kind: str, mood: str, tmp_path: Path) -> None:
    """Of bodies up to the size of a buffer."""

    async def run() -> None:
        async with balanced(kind, tmp_path, "bad", "good") as ([bad, good], client, _):
            bad.mood = mood
            for size in (0, 10, 200_000, 250_000):
                for _ in range(4):
                    answer = await client.post("/v1/completions", content=b"x" * size)
                    assert (answer.status_code, answer.json()["by"]) == (200, "good")
                    assert good.bodies[-1] == size
            assert bad.asked > 0

    asyncio.run(run())


@pytest.mark.parametrize("kind", KINDS)
def test_a_body_larger_than_a_buffer_comes_whole_or_fails(kind: str, tmp_path: Path) -> None:
    async def run() -> None:
        async with balanced(kind, tmp_path, "bad", "good") as ([bad, good], client, _):
            bad.mood = "dies"
            statuses = []
            while len(statuses) < 6 or not (good.bodies and bad.asked):  # which one is asked is left to chance
                try:
                    answer = await client.post("/v1/completions", content=b"x" * 2_000_000)
                    statuses.append(answer.status_code)
                except httpx.RemoteProtocolError:  # HAProxy hangs up where it answered on this connection before
                    statuses.append(502)
            assert set(statuses) <= {200, 502, 503}
            assert good.bodies == [2_000_000] * statuses.count(200)
            assert good.bodies and bad.asked

    asyncio.run(run())


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_has_begun_is_not_asked_for_again(kind: str, tmp_path: Path) -> None:
    async def run() -> None:
        async with balanced(kind, tmp_path, "bad", "good") as ([bad, good], client, _):
            bad.mood = "halves"
            whole = broken = 0
            while not (whole and broken):  # which one is asked is left to chance
                try:
                    answer = await client.post("/v1/completions", content=b"x")
                    assert answer.json()["by"] == "good"
                    whole += 1
                except httpx.RemoteProtocolError:
                    broken += 1
            assert (good.asked, bad.asked) == (whole, broken)

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["haproxy", "envoy"])
def test_who_is_not_ready_gets_nothing_until_it_is(kind: str, tmp_path: Path) -> None:
    """And where nobody is, callers are told so."""

    async def ask(client: httpx.AsyncClient) -> set[str]:
        answers = [await client.post("/v1/completions", content=b"x") for _ in range(12)]
        return {str(answer.json().get("by", answer.status_code)) for answer in answers}

    async def until(client: httpx.AsyncClient, expected: set[str]) -> None:
        async with asyncio.timeout(LIMIT):
            while await ask(client) != expected:
                await asyncio.sleep(0.2)

    async def run() -> None:
        async with balanced(kind, tmp_path, "a", "b") as ([a, b], client, _):
            a.ready = False
            await until(client, {"b"})
            asked = a.asked
            assert await ask(client) == {"b"}
            assert a.asked == asked
            a.ready = True
            await until(client, {"a", "b"})
            if kind == "haproxy":
                a.ready = b.ready = False
                await until(client, {"503"})
                answer = await client.post("/v1/completions", content=b"x")
                assert answer.json()["error"]["message"] == "no gateway is ready; try again"
                assert answer.headers["retry-after"] == "1"

    asyncio.run(run())


@pytest.mark.parametrize("kind", KINDS)
def test_without_gateways_callers_are_told(kind: str, tmp_path: Path) -> None:
    async def run() -> None:
        async with balanced(kind, tmp_path) as (_, client, _):
            answer = await client.get("/v1/models")
            assert answer.status_code in (502, 503)
            if kind != "envoy":
                assert answer.json()["error"]["type"] == "server_error"

    asyncio.run(run())


GATEWAYS = [
    GatewayAddress(name="gateway-a-0", host="10.0.0.1", http_port=8000, grpc_port=50051),
    GatewayAddress(name="gateway-b-0", host="fd00::2", http_port=8001, grpc_port=50052),
]
CHECKS = {"haproxy": ["-c", "-f"], "nginx": ["-t", "-q", "-c"], "envoy": ["--mode", "validate", "-c"]}


def made(kind: str, folder: Path, *gateways: GatewayAddress) -> str:
    listens = Listens(host="127.0.0.1", port=8080, grpc_port=50050, socket=str(folder / "socket"))
    return configuration(kind, gateways, listens)


@pytest.mark.parametrize("kind", KINDS)
def test_other_addresses_are_accepted(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "configuration.yaml"  # Envoy goes by the name
    path.write_text(made(kind, tmp_path, *GATEWAYS))
    done = subprocess.run([program(kind), *CHECKS[kind], str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_gateways_that_share_ports_are_one(kind: str, tmp_path: Path) -> None:
    first = GATEWAYS[0]
    twin = GatewayAddress(name="gateway-a-1", host=first.host, http_port=8000, grpc_port=50051)
    assert made(kind, tmp_path, first, twin) == made(kind, tmp_path, twin, first) == made(kind, tmp_path, first)
