"""The parts of a server: none ends unseen, and all end together."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from fake_replica import FakeReplica
from gateways import TOKENS, tokens, until
from quire_cluster.config import ServeConfig
from quire_cluster.gateway.connection import HttpServer
from quire_cluster.gateway.generation import Call
from quire_cluster.gateway.models import Models
from quire_cluster.gateway.process import Gateway
from quire_cluster.gateway.service import Service
from quire_cluster.governance.callers import ANYONE
from quire_cluster.routing_table import ClusterTable, RoutingTable, Served
from quire_cluster.serve import Server
from quire_engine.config import EngineConfig
from quire_engine.errors import (
    ServerError,
)
from quire_engine.models.check import check_model
from quire_engine.text.params import SamplingParams


def server_of(folder: Path, kind: type[Server] = Server, **options: Any) -> Server:
    """A server of one model, not started."""
    engine = EngineConfig(model=str(folder))
    return kind(engine, ServeConfig(served_model_name="tiny", **options), check_model(engine))


def table(server: Server, version: int, *replicas: FakeReplica, failure: str | None = None) -> ClusterTable:
    """What the controller says."""
    entries = tuple(replica.entry() for replica in replicas)
    return ClusterTable(version, (Served(server._deployment, RoutingTable(entries, failure)),))


CALL = Call(route="", caller=ANYONE)


@asynccontextmanager
async def serving(gate: Service, folder: Path) -> AsyncIterator[tuple[Server, FakeReplica]]:
    """A server whose gateway has this service and one replica."""
    server = server_of(folder, shutdown_timeout=86400)
    server._gateway = Gateway(server._serve, None, name="test")
    replica = await FakeReplica().start()
    server._gateway.models.follow(table(server, 1, replica), [gate])
    await until(lambda: gate.ready)
    try:
        yield server, replica
    finally:
        await server._gateway.models.close()
        await replica.stop()


def test_a_second_signal_does_not_wait_for_what_runs(
    service: Callable[[], Service], checkpoint: Callable[[str], Path]
) -> None:
    async def run() -> None:
        gate = service()
        async with serving(gate, checkpoint("llama")) as (server, replica):
            replica.holds = lambda submit: True
            generation = gate.start([5, 6], await gate.sampling(SamplingParams()), CALL)
            server._catch_signals()
            for first in (signal.SIGINT, signal.SIGHUP):
                os.kill(os.getpid(), first)
                await server._stop.wait()
                server._stop.clear()
            server.stop()
            ending = asyncio.ensure_future(server._shut_down())
            await until(lambda: gate.draining)
            assert not ending.done()
            os.kill(os.getpid(), signal.SIGTERM)
            async with asyncio.timeout(60):
                await ending
            assert not generation.choices[0].output

    asyncio.run(run())


def test_an_answer_that_is_still_read_is_waited_for(
    service: Callable[[], Service], checkpoint: Callable[[str], Path]
) -> None:
    """Its last token is there, but not with the client."""

    async def run() -> None:
        gate = service()
        async with serving(gate, checkpoint("llama")) as (server, _):
            generation = gate.start([5, 6], await gate.sampling(SamplingParams(max_tokens=TOKENS)), CALL)
            await until(lambda: generation.choices[0].ended)
            ending = asyncio.ensure_future(server._shut_down())
            await until(lambda: gate.draining)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(ending), 0.2)
            assert len(await tokens(generation)) == TOKENS
            gate.finished(generation)
            async with asyncio.timeout(60):
                await ending

    asyncio.run(run())


def test_following_the_controller_never_ends_unseen(
    service: Callable[[], Service], checkpoint: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever asking it raises; what is served goes on meanwhile. Where no replica will serve, the server ends."""

    async def run() -> None:
        gate = service()
        async with serving(gate, checkpoint("llama")) as (server, replica):
            second = await FakeReplica().start()
            answers: list[Exception | ClusterTable] = [
                ConnectionError("the head is gone"),
                table(server, 2, replica, second),
                KeyError("a bug"),
                ray.exceptions.RayActorError(),
                table(server, 3, failure="the disk is gone"),
            ]

            class Watch:
                @staticmethod
                async def remote(version: int) -> ClusterTable:
                    if not answers:
                        await asyncio.Event().wait()
                    answer = answers.pop(0)
                    if isinstance(answer, ClusterTable):
                        assert version < answer.version
                        return answer
                    there = 1 if isinstance(answer, ConnectionError) else 2
                    await until(lambda: len(gate.dispatcher.sessions) == there)
                    raise answer

            class Ping:
                @staticmethod
                def remote() -> SimpleNamespace:
                    return SimpleNamespace(future=Future)

            server._gateway._controller = SimpleNamespace(watch=Watch, ping=Ping)
            following = asyncio.ensure_future(server._gateway._watch(server._look_for_failure))
            async with asyncio.timeout(300):
                await server._stop.wait()
            assert not following.done()
            assert str(server._failure) == "the disk is gone"
            following.cancel()
            await second.stop()

    asyncio.run(run())
    for said in ("the head is gone", "a bug", "the controller died; Ray starts it again"):
        assert said in caplog.text


PARTS = [
    "the HTTP server",
    "the gRPC server",
    "telling the gRPC health service",
    "following the controller",
    "reporting to the controller",
]


@pytest.mark.parametrize("part", PARTS)
def test_a_server_ends_with_any_part_of_it(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Half a server would be taken for a whole one."""

    class WithoutRay(Server):
        def _start_cluster(self) -> None:
            pass

        async def _start_controller(self) -> None:
            pass

    async def fail(*_: Any) -> None:
        raise KeyError("a bug")

    def unready(_: Models) -> bool:
        raise KeyError("a bug")

    async def run() -> None:
        disturbed = asyncio.Event()
        replica = await FakeReplica().start()
        server = server_of(checkpoint("llama"), WithoutRay, port=0, grpc_port=0, shutdown_timeout=0)

        async def watch(gateway: Gateway, on_table: Callable[[ClusterTable], None]) -> None:
            gateway.models.follow(table(server, 1, replica))
            await disturbed.wait()
            await (fail() if part == "following the controller" else asyncio.Event().wait())

        async def report(gateway: Gateway) -> None:
            await disturbed.wait()
            await (fail() if part == "reporting to the controller" else asyncio.Event().wait())

        def disturb(server: Server) -> None:
            disturbed.set()
            if part == "the HTTP server":
                monkeypatch.setattr(HttpServer, "on_tick", fail)
            elif part == "the gRPC server":
                assert server._gateway._grpc is not None
                stopping.append(asyncio.ensure_future(server._gateway._grpc.stop(0)))
            elif part == "telling the gRPC health service":
                monkeypatch.setattr(Models, "ready", property(unready))

        stopping: list[asyncio.Future[None]] = []
        monkeypatch.setattr(Gateway, "_watch", watch)
        monkeypatch.setattr(Gateway, "_report", report)
        try:
            async with asyncio.timeout(300):
                await server.run(disturb)
        finally:
            await replica.stop()

    why = "" if part == "the gRPC server" else ": KeyError: 'a bug'"
    with pytest.raises(ServerError, match=f"^{part} ended by itself{why}; start the server again$"):
        asyncio.run(run())
