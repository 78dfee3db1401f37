"""How a controller keeps its slots, without Ray: what a slot starts is the test's."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from quire_cluster import controller as module
from quire_cluster.controller import Controller
from quire_cluster.policies import restart
from quire_cluster.routing_table import ReplicaEntry
from quire_engine.config import EngineConfig
from quire_engine.errors import EngineFailure, OutOfMemory


class Clock:
    """Of the controller: it goes on only where a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Rehearsed(Controller):
    """`load` and `serve` are what becomes of each start of a slot: they return, or raise."""

    def __init__(self, slots: int, load: Callable[[int], None], serve: Callable[[int], Any]) -> None:
        super().__init__("test", EngineConfig(model="none"), slots, threads=1, gpu=False, host=None)
        self.starts = [0] * slots
        self._load, self._serve = load, serve

    async def _start(self, index: int, slot: Any) -> None:
        self.starts[index] += 1
        self._load(index)

        class Run:
            @staticmethod
            async def remote() -> None:
                await self._serve(index)

        class Actor:
            run = Run

        slot.actor = Actor
        slot.entry = ReplicaEntry(index, self.starts[index], "127.0.0.1:1", 512)
        await self._publish()

    def _remove(self, slot: Any) -> None:
        slot.actor = slot.entry = None

    async def keep(self) -> None:
        """Until every slot is given up or has been stopped."""
        async with asyncio.timeout(60):
            await asyncio.gather(*(self._keep(index) for index in range(len(self.starts))))


def test_a_slot_that_is_given_up_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only once all are is there nothing left to wait for, and the reason is told."""
    monkeypatch.setattr(restart, "_PAUSES", (0.0,))
    died = asyncio.Event()

    def load(index: int) -> None:
        if index == 0 or died.is_set():
            raise OutOfMemory(f"the weights of {index} do not fit")

    async def serve(index: int) -> None:
        await died.wait()
        raise EngineFailure("a worker process died")

    async def run() -> None:
        controller = Rehearsed(2, load, serve)
        keeping = asyncio.ensure_future(controller.keep())
        async with asyncio.timeout(60):
            while controller._slots[0].given_up is None or not controller._table.replicas:
                await asyncio.sleep(0.01)
        table = await controller.watch(0)
        assert table.failure is None
        assert [entry.slot for entry in table.replicas] == [1]
        died.set()
        await keeping
        assert controller._table.failure == "the weights of 1 do not fit"

    asyncio.run(run())


def test_time_of_loading_is_no_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes minutes to load and dies at once has not served for minutes."""
    clock, told, plain = Clock(), list[float | None](), restart.Restarts.failed

    def failed(self: restart.Restarts, service: float | None, *, died: bool) -> float | None:
        told.append(service)
        return plain(self, service, died=died)

    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(restart, "_PAUSES", (0.0,))
    monkeypatch.setattr(restart.Restarts, "failed", failed)

    def load(index: int) -> None:
        clock.now += 1000.0
        if controller.starts[0] == 2:
            raise EngineFailure("a worker process died")

    async def serve(index: int) -> None:
        clock.now += controller.starts[0]
        if controller.starts[0] < 4:
            raise EngineFailure("a worker process died")

    controller = Rehearsed(1, load, serve)
    asyncio.run(controller.keep())
    assert told == [1.0, None, 3.0]
