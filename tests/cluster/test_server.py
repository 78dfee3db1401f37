"""The parts of a server: none ends unseen, and all end together."""

import asyncio
import os
import signal
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_replica import FakeReplica
from gateways import TOKENS, http, models_of, tokens, until
from quire_cluster.config import ServeConfig
from quire_cluster.deployment import Deployment, DeploymentConfig
from quire_cluster.gateway import process
from quire_cluster.gateway.connection import HttpServer
from quire_cluster.gateway.models import Models
from quire_cluster.gateway.process import Gateway
from quire_cluster.gateway.service import Service
from quire_cluster.reports import GatewayReport
from quire_cluster.routing_table import ClusterTable, RoutingTable, Served
from quire_cluster.serve import Server
from quire_engine.config import EngineConfig
from quire_engine.errors import (
    ServerError,
)
from quire_engine.text.params import SamplingParams
from quire_engine.weights.resolve import find_model


def gateway_of(gate: Service) -> Gateway:
    """That answers nobody."""
    gateway = Gateway(ServeConfig(), None, identity="test")
    gateway.models = models_of(gate)
    return gateway


def test_a_second_signal_does_not_wait_for_what_runs(
    service: Callable[[], Service], checkpoint: Callable[[str], Path]
) -> None:
    async def run() -> None:
        gate = service()
        engine = EngineConfig(model=str(checkpoint("llama")))
        server = Server(engine, ServeConfig(shutdown_timeout=86400), find_model(engine))
        async with http(gate) as (_, replica):
            server._gateway = gateway_of(gate)
            replica.holds = lambda submit: True
            generation = gate.start([5, 6], await gate.sampling(SamplingParams()))
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


def test_an_answer_that_is_still_read_is_waited_for(service: Callable[[], Service]) -> None:
    """Its last token is there, but not with the client."""

    async def run() -> None:
        gate = service()
        async with http(gate):
            gateway = gateway_of(gate)
            generation = gate.start([5, 6], await gate.sampling(SamplingParams(max_tokens=TOKENS)))
            await until(lambda: generation.choices[0].ended)
            ending = asyncio.ensure_future(gateway.drain(86400))
            await until(lambda: gate.draining)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(ending), 0.2)
            assert len(await tokens(generation)) == TOKENS
            gate.finished(generation, route="test")
            async with asyncio.timeout(60):
                await ending

    asyncio.run(run())


class Actor:
    """A controller whose tables are the test's; it raises those that are errors."""

    def __init__(self, tables: list[Exception | ClusterTable]) -> None:
        self._tables = tables

    @property
    def ping(self) -> Any:
        return SimpleNamespace(remote=lambda: SimpleNamespace(future=Future))

    @property
    def report(self) -> Any:
        async def remote(report: GatewayReport) -> None:
            pass

        return SimpleNamespace(remote=remote)

    @property
    def watch(self) -> Any:
        async def remote(version: int) -> ClusterTable:
            if not self._tables:
                await asyncio.Event().wait()
            answer = self._tables.pop(0)
            if isinstance(answer, ClusterTable):
                return answer
            raise answer

        return SimpleNamespace(remote=remote)


def table_of(gate: Service, version: int, table: RoutingTable) -> ClusterTable:
    deployment = Deployment(gate.names[0], EngineConfig(model="none"), DeploymentConfig())
    return ClusterTable(version, (Served(deployment, table),))


def test_following_the_controller_never_ends_unseen(
    service: Callable[[], Service], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever asking it raises; what is served goes on meanwhile."""
    monkeypatch.setattr(process, "_RETRY", 0.01)

    async def run() -> None:
        gate = service()
        replica = await FakeReplica().start()
        gateway = gateway_of(gate)
        failures: list[str] = []
        tables: list[Exception | ClusterTable] = [
            ConnectionError("the head is gone"),
            table_of(gate, 1, RoutingTable((replica.entry(),))),
            KeyError("a bug"),
            table_of(gate, 2, RoutingTable((), "the disk is gone")),
        ]

        def look(table: ClusterTable) -> None:
            failures.extend(served.table.failure for served in table.deployments if served.table.failure)

        following = asyncio.ensure_future(follow(gateway, Actor(tables), look))
        await until(lambda: bool(failures))
        assert gate.dispatcher.max_model_len == 4096
        assert failures == ["the disk is gone"]
        following.cancel()
        await gateway.stop()
        await replica.stop()

    async def follow(gateway: Gateway, actor: Any, look: Callable[[ClusterTable], None]) -> None:
        gateway._controller = actor
        await gateway._watch(look)

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
            replica = await FakeReplica().start()
            table = ClusterTable(1, (Served(self._deployment, RoutingTable((replica.entry(),))),))
            self._gateway.models.follow(table)
            monkeypatch.setattr(Gateway, "follow", lambda *_: None)

    async def fail(*_: Any) -> None:
        raise KeyError("a bug")

    def unready(_: Models) -> bool:
        raise KeyError("a bug")

    def disturb(server: Server) -> None:
        if part == "the HTTP server":
            monkeypatch.setattr(HttpServer, "on_tick", fail)
        elif part == "the gRPC server":
            running = server._gateway._grpc
            assert running is not None
            server._stopping = asyncio.ensure_future(running.stop(0))
        else:
            monkeypatch.setattr(Models, "ready", property(unready))

    async def run() -> None:
        engine = EngineConfig(model=str(checkpoint("llama")))
        server = OverOneReplica(engine, ServeConfig(port=0, grpc_port=0, shutdown_timeout=0), find_model(engine))
        async with asyncio.timeout(300):
            await server.run(disturb)

    why = "" if part == "the gRPC server" else ": KeyError: 'a bug'"
    with pytest.raises(ServerError, match=f"^{part} ended by itself{why}; start the server again$"):
        asyncio.run(run())
