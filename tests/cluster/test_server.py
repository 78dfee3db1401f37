"""The parts of a server: none ends unseen, and all end together."""

import asyncio
import gc
import os
import signal
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_replica import FakeReplica
from gateways import TOKENS, http, tokens, until
from quire_cluster.config import ServeConfig
from quire_cluster.gateway.connection import HttpServer
from quire_cluster.gateway.grpc_api import GrpcServer
from quire_cluster.gateway.service import Service
from quire_cluster.liveness import LivenessProbe
from quire_cluster.routing_table import RoutingTable
from quire_cluster.serve import Server
from quire_engine.config import EngineConfig
from quire_engine.errors import (
    ServerError,
)
from quire_engine.text.params import SamplingParams
from quire_engine.weights.resolve import find_model


def test_a_second_signal_does_not_wait_for_what_runs(
    service: Callable[[], Service], checkpoint: Callable[[str], Path]
) -> None:
    async def run() -> None:
        gate = service()
        engine = EngineConfig(model=str(checkpoint("llama")))
        server = Server(engine, ServeConfig(shutdown_timeout=86400), find_model(engine))
        async with http(gate) as (_, replica):
            replica.holds = lambda submit: True
            generation = gate.start([5, 6], await gate.sampling(SamplingParams()))
            server._catch_signals()
            for first in (signal.SIGINT, signal.SIGHUP):
                os.kill(os.getpid(), first)
                await server._stop.wait()
                server._stop.clear()
            server.stop()
            ending = asyncio.ensure_future(server._shut_down(gate, None, None, None, []))
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
        engine = EngineConfig(model=str(checkpoint("llama")))
        server = Server(engine, ServeConfig(shutdown_timeout=86400), find_model(engine))
        async with http(gate):
            generation = gate.start([5, 6], await gate.sampling(SamplingParams(max_tokens=TOKENS)))
            await until(lambda: generation.choices[0].ended)
            ending = asyncio.ensure_future(server._shut_down(gate, None, None, None, []))
            await until(lambda: gate.draining)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(ending), 0.2)
            assert len(await tokens(generation)) == TOKENS
            gate.finished(generation, route="test")
            async with asyncio.timeout(60):
                await ending

    asyncio.run(run())


def test_following_the_controller_never_ends_unseen(
    service: Callable[[], Service], checkpoint: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever asking it raises; what is served goes on meanwhile."""

    async def run() -> None:
        gate = service()
        replica = await FakeReplica().start()
        engine = EngineConfig(model=str(checkpoint("llama")))
        server = Server(engine, ServeConfig(), find_model(engine))
        answers: list[Exception | RoutingTable] = [
            ConnectionError("the head is gone"),
            RoutingTable((replica.entry(),)),
            KeyError("a bug"),
            RoutingTable((), "the disk is gone"),
        ]

        class Watch:
            @staticmethod
            async def remote(version: int) -> RoutingTable:
                answer = answers.pop(0)
                if isinstance(answer, RoutingTable):
                    return answer
                raise answer

        class Ping:
            @staticmethod
            def remote() -> SimpleNamespace:
                return SimpleNamespace(future=Future)

        class Actor:
            watch, ping = Watch, Ping

        server._controller, server._liveness = Actor, LivenessProbe(Actor, "the controller")
        async with asyncio.timeout(300):
            await server._watch(gate)
        assert gate.dispatcher.max_model_len == 4096
        await gate.dispatcher.close()
        await replica.stop()

    asyncio.run(run())
    assert "the head is gone" in caplog.text
    assert "a bug" in caplog.text


@pytest.mark.parametrize("part", ["the HTTP server", "the gRPC server", "telling the gRPC health service"])
def test_a_server_ends_with_any_part_of_it(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Half a server would be taken for a whole one."""

    class OverOneReplica(Server):
        def _start_cluster(self) -> None:
            pass

        async def _start_controller(self) -> None:
            pass

        async def _watch(self, service: Service) -> None:
            replica = await FakeReplica().start()
            service.dispatcher.update_table(RoutingTable((replica.entry(),)))
            try:
                await asyncio.Event().wait()
            finally:
                await replica.stop()

    async def fail(*_: Any) -> None:
        raise KeyError("a bug")

    def unready(_: Service) -> bool:
        raise KeyError("a bug")

    def disturb(server: Server) -> None:
        if part == "the HTTP server":
            monkeypatch.setattr(HttpServer, "on_tick", fail)
        elif part == "the gRPC server":
            [running] = [one for one in gc.get_objects() if type(one) is GrpcServer]
            server._stopping = asyncio.ensure_future(running.stop(0))
        else:
            monkeypatch.setattr(Service, "ready", property(unready))

    async def run() -> None:
        engine = EngineConfig(model=str(checkpoint("llama")))
        server = OverOneReplica(engine, ServeConfig(port=0, grpc_port=0, shutdown_timeout=0), find_model(engine))
        async with asyncio.timeout(300):
            await server.run(disturb)

    why = "" if part == "the gRPC server" else ": KeyError: 'a bug'"
    with pytest.raises(ServerError, match=f"^{part} ended by itself{why}; start the server again$"):
        asyncio.run(run())
