"""How a deployment's slots are kept, without Ray: what a slot starts is the test's."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from quire_cluster import keeper as keeper_module
from quire_cluster import slot as module
from quire_cluster.demand import Demand
from quire_cluster.deployment import Deployment, DeploymentConfig
from quire_cluster.keeper import Keeper
from quire_cluster.policies import restart
from quire_cluster.policies.reconcile import Phase
from quire_cluster.replica_actor import Place, ReplicaFacts
from quire_cluster.slot import Home, Needs, Slot
from quire_cluster.store import Record
from quire_engine.config import EngineConfig
from quire_engine.errors import EngineFailure, OutOfMemory

NOTHING: Any = None
NOBODY = Demand(replicas={})


class Clock:
    """Of the slots: it goes on only where a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    time = monotonic


class Rehearsed(Slot):
    """`load` and `serve` are what becomes of each start of a slot: they return, or raise."""

    load: Callable[[int, int], None]
    serve: Callable[[int, int], Any]
    starts = 0

    async def _start(self) -> None:
        self.starts += 1
        self._enter(Phase.LOADING)

    async def _until_loaded(self) -> None:
        type(self).load(self.index, self.starts)
        slot = self

        class Run:
            @staticmethod
            async def remote() -> None:
                await type(slot).serve(slot.index, slot.starts)

        class Stop:
            @staticmethod
            async def remote() -> None:
                pass

        class Actor:
            run, stop = Run, Stop

        self._actor = Actor
        place = Place(group="", nodes=("node",), host="127.0.0.1")
        facts = ReplicaFacts(deployment=self.deployment, place=place, address="127.0.0.1:1", max_model_len=512)
        self._serves(facts)

    async def _remove(self) -> None:
        self._actor = self.entry = None


class Kept(Keeper):
    """A deployment of `replicas`, whose slots are rehearsed."""

    def __init__(self, replicas: int) -> None:
        class Memory:
            async def write(self, record: Record) -> None:
                pass

        self.running: set[asyncio.Future[Any]] = set()
        deployment = Deployment("test", EngineConfig(model="none"), DeploymentConfig(min_replicas=replicas))
        home = Home(namespace="test", host=None, secret="", placements=NOTHING, addresses=lambda node: None)
        memory: Any = Memory()
        super().__init__(
            Record(deployment=deployment, needs=Needs(gpu=False, threads=1)),
            home,
            memory,
            changed=lambda: None,
            begin=lambda work: self.running.add(asyncio.ensure_future(work)),
        )

    async def until(self, condition: Callable[[], bool]) -> None:
        """Reconciling all the while."""
        async with asyncio.timeout(60):
            while not condition():
                self.reconcile(NOBODY, frozenset())
                await asyncio.sleep(0.001)


def rehearse(
    monkeypatch: pytest.MonkeyPatch, load: Callable[[int, int], None], serve: Callable[[int, int], Any]
) -> None:
    monkeypatch.setattr(Rehearsed, "load", staticmethod(load), raising=False)
    monkeypatch.setattr(Rehearsed, "serve", staticmethod(serve), raising=False)
    monkeypatch.setattr(keeper_module, "Slot", Rehearsed)
    monkeypatch.setattr(restart, "_PAUSES", (0.0,))


def test_a_slot_that_is_given_up_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only once all are is there nothing left to wait for, and the reason is told. Who deploys again has mended it."""

    async def run() -> None:
        died, mended = asyncio.Event(), asyncio.Event()

        def load(index: int, start: int) -> None:
            if not mended.is_set() and (index == 0 or died.is_set()):
                raise OutOfMemory(f"the weights of {index} do not fit")

        async def serve(index: int, start: int) -> None:
            await (died if not mended.is_set() else asyncio.Event()).wait()
            raise EngineFailure("a worker process died")

        rehearse(monkeypatch, load, serve)
        kept = Kept(2)
        await kept.until(lambda: {slot.phase for slot in kept.slots} == {Phase.FAILED, Phase.SERVING})
        table = kept.served().table
        assert table.failure is None
        assert [entry.slot for entry in table.replicas] == [1]
        died.set()
        await kept.until(lambda: [slot.phase for slot in kept.slots] == [Phase.FAILED] * 2)
        assert kept.served().table.failure == "the weights of 1 do not fit"
        mended.set()
        kept.change(kept.record)
        await kept.until(lambda: [slot.phase for slot in kept.slots] == [Phase.SERVING] * 2)
        assert kept.served().table.failure is None

    asyncio.run(run())


def test_time_of_loading_is_no_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes minutes to load and dies at once has not served for minutes."""
    clock, told, plain = Clock(), list[float | None](), restart.Restarts.failed

    def failed(self: restart.Restarts, service: float | None, *, died: bool) -> float | None:
        told.append(service)
        return plain(self, service, died=died)

    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(restart.Restarts, "failed", failed)

    def load(index: int, start: int) -> None:
        clock.now += 1000.0
        if start == 2:
            raise EngineFailure("a worker process died")

    async def run() -> None:
        done = asyncio.Event()

        async def serve(index: int, start: int) -> None:
            clock.now += start
            if start == 4:
                done.set()
                await asyncio.Event().wait()
            raise EngineFailure("a worker process died")

        rehearse(monkeypatch, load, serve)
        kept = Kept(1)
        await kept.until(done.is_set)

    asyncio.run(run())
    assert told == [1.0, None, 3.0]
