"""Processes that are stopped, not killed, where nobody asks them for a step: while they load, and the controller."""

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from conftest import processes, wait_until
from quire_cluster import liveness
from quire_cluster.config import ServeConfig
from quire_cluster.controller import ClusterConfig, Controller
from quire_cluster.deployment import Deployment, DeploymentConfig
from quire_cluster.gateway.process import Gateway
from quire_cluster.governance.callers import ANYONE
from quire_cluster.liveness import CONTROLLER, LivenessProbe, while_alive
from quire_cluster.local_ray import start_private_cluster
from quire_cluster.serve import Server
from quire_cluster.workers import Workers
from quire_engine.config import EngineConfig
from quire_engine.errors import EngineFailure
from quire_engine.models.check import check_model

LIMIT = 600.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    running = start_private_cluster(num_workers=2)
    yield
    running.stop()


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this process. It counts only after a first answer, which may take long on a busy machine."""
    monkeypatch.setattr(liveness, "SILENCE", 4.0)


@pytest.fixture
def config(checkpoint: Callable[[str], Path]) -> EngineConfig:
    return EngineConfig(model=str(checkpoint("llama")), kv_cache_memory_bytes=1 << 20, cpu_threads=1)


class Quiet:
    """An actor whose answers are the test's."""

    def __init__(self) -> None:
        self.answers: list[Future[None]] = []

    @property
    def ping(self) -> Any:
        def remote() -> SimpleNamespace:
            answer: Future[None] = Future()
            self.answers.append(answer)
            return SimpleNamespace(future=lambda: answer)

        return SimpleNamespace(remote=remote)


def test_an_actor_that_answers_may_take_as_long_as_it_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was stopped itself in between blames nobody."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(liveness, "time", SimpleNamespace(monotonic=lambda: clock.now))
    actor = Quiet()
    probe = LivenessProbe(actor, "rank 1")

    def silence(seconds: float) -> None:
        for _ in range(int(seconds / 0.25)):
            clock.now += 0.25
            probe.check()

    silence(599)
    for _ in range(100):
        actor.answers[-1].set_result(None)
        silence(3.5)
    clock.now += 1000.0
    probe.check()
    with pytest.raises(EngineFailure, match="rank 1 says nothing for 4 s; its process is stopped, or its host gone"):
        silence(4)
    starting = LivenessProbe(Quiet(), "rank 0")
    waiting = LivenessProbe(Quiet(), "rank 0", placed=False)
    with pytest.raises(EngineFailure, match="rank 0 says nothing for 600 s"):
        while True:
            clock.now += 0.25
            waiting.check()  # for room in the cluster, for ever
            starting.check()


def test_what_is_asked_for_is_answered_or_its_failure() -> None:
    async def run() -> None:
        probe = LivenessProbe(Quiet(), "it")
        assert await while_alive(asyncio.sleep(0.6, 5), probe) == 5
        failing: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        failing.set_exception(KeyError("why"))
        with pytest.raises(KeyError, match="why"):
            await while_alive(failing, probe)

    asyncio.run(run())


@pytest.mark.usefixtures("cluster")
def test_a_worker_that_hangs_while_it_loads_is_found(config: EngineConfig) -> None:
    with ThreadPoolExecutor(1) as opening:
        opened = opening.submit(Workers, config, threads=1)
        wait_until(lambda: len(processes(os.getpid(), "Worker.load")) == 1)
        [victim] = processes(os.getpid(), "Worker.load")
        os.kill(victim, signal.SIGSTOP)
        with pytest.raises(EngineFailure, match=r"^rank 0 says nothing for 4 s"):
            opened.result(LIMIT)
    wait_until(lambda: not Path(f"/proc/{victim}").exists())


@pytest.fixture
def named() -> Iterator[str]:
    """A cluster's name, under which replicas find a controller: they would end without."""

    class Nobody:
        pass

    nobody = ray.remote(Nobody).options(name=CONTROLLER, namespace="quire-test", num_cpus=0).remote()
    yield "quire-test"
    ray.kill(nobody)


@pytest.mark.usefixtures("cluster")
def test_a_replica_that_hangs_while_it_loads_is_replaced(config: EngineConfig, named: str) -> None:
    async def run() -> None:
        controller = Controller(ClusterConfig(name=named, host="127.0.0.1", private=True))
        await controller.deploy([Deployment("tiny", config, DeploymentConfig())], contexts={"tiny": 64})
        try:
            await asyncio.to_thread(wait_until, lambda: bool(processes(os.getpid(), "Worker")))
            [victim] = processes(os.getpid(), "Replica")
            os.kill(victim, signal.SIGSTOP)
            table = await asyncio.wait_for(controller.watch(0), LIMIT)
            while not table.deployments[0].table.replicas:
                table = await asyncio.wait_for(controller.watch(table.version), LIMIT)
            assert [(replica.slot, replica.epoch) for replica in table.deployments[0].table.replicas] == [(0, 2)]
            await asyncio.to_thread(wait_until, lambda: not Path(f"/proc/{victim}").exists())
        finally:
            await controller.shutdown()
            await asyncio.to_thread(wait_until, lambda: not processes(os.getpid(), "Replica"))

    asyncio.run(run())


@pytest.mark.usefixtures("cluster")
@pytest.mark.slow
def test_a_controller_that_hangs_is_started_again(config: EngineConfig, caplog: pytest.LogCaptureFixture) -> None:
    """Its replicas go on, and the new one looks after them."""

    async def run() -> None:
        server = Server(config, ServeConfig(served_model_name="tiny"), check_model(config))
        gateway = server._gateway = Gateway(server._serve, None, name="test")
        server._take(gateway.models.read(server._deployment))
        dispatcher = (await gateway.models.find("tiny", ANYONE)).dispatcher
        await server._start_controller()
        gateway.follow(server._controller)

        def replicas() -> list[tuple[int, int]]:
            return [session.key[:2] for session in dispatcher.sessions]

        def controllers() -> list[int]:
            return processes(os.getpid(), "Controller")

        try:
            async with asyncio.timeout(LIMIT):
                while replicas() != [(0, 1)]:
                    await asyncio.sleep(0.1)
                [before], [victim] = processes(os.getpid(), "Replica"), controllers()
                os.kill(victim, signal.SIGSTOP)
                while victim in controllers() or not controllers():
                    await asyncio.sleep(0.1)
                    assert replicas() == [(0, 1)]
                found = await server._controller.status.remote()
                [[replica]] = [deployment.replicas for deployment in found.deployments]
                assert (replica.slot, replica.epoch, replica.phase) == (0, 1, "serving")
                assert processes(os.getpid(), "Replica") == [before]
                os.kill(before, signal.SIGKILL)
                while replicas() != [(0, 2)]:
                    await asyncio.sleep(0.1)
        finally:
            await gateway.stop()
            await server._controller.shutdown.remote()
            ray.kill(server._controller)

    asyncio.run(run())
    assert "the controller says nothing for 4 s; its process is stopped, or its host gone; it is started again" in (
        caplog.text
    )
