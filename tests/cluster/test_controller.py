"""How a deployment keeps its slots, without Ray: what a slot starts is the test's."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from gateways import until
from quire_cluster import keeper as keeper_module
from quire_cluster import slot as module
from quire_cluster.deployment import Deployment, DeploymentConfig
from quire_cluster.keeper import Demand, Keeper
from quire_cluster.policies import restart
from quire_cluster.policies.reconcile import Act, Phase, SlotView
from quire_cluster.replica_actor import Place, ReplicaFacts
from quire_cluster.slot import Needs, Slot
from quire_cluster.store import Record, Store
from quire_engine.config import EngineConfig
from quire_engine.errors import EngineFailure, OutOfMemory

NOTHING = Demand(replicas={})
PLACE = Place(group="", nodes=(), host="127.0.0.1")


class Clock:
    """Of the slots: it goes on only where a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


class Kept:
    """A store that has what was written last."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}

    async def write(self, record: Record) -> None:
        await asyncio.sleep(0)
        self.records[record.deployment.name] = record


class RehearsedSlot(Slot):
    """`load` and `serve` are what becomes of each start of a slot: they return, or raise."""

    load: Callable[[int], None]
    serve: Callable[[int], Coroutine[Any, Any, None]]
    starts = 0

    async def _start(self) -> None:
        self.epoch = self._next_epoch()
        self.starts += 1
        self._enter(Phase.LOADING)

    async def _until_loaded(self) -> None:
        self.load(self.index)

        async def run() -> None:
            await self.serve(self.index)

        async def stop() -> None:
            pass

        self._actor = SimpleNamespace(run=SimpleNamespace(remote=run), stop=SimpleNamespace(remote=stop))
        facts = ReplicaFacts(deployment=self.deployment, place=PLACE, address="127.0.0.1:1", max_model_len=512)
        self._serves(facts)

    async def _remove(self) -> None:
        self._actor = self.entry = None


class Rehearsed(Keeper):
    """A deployment whose slots are those."""

    def __init__(self, replicas: int, load: Callable[[int], None], serve: Callable[[int], Any]) -> None:
        config = DeploymentConfig(min_replicas=replicas)
        record = Record(
            deployment=Deployment("test", EngineConfig(model="none"), config), needs=Needs(gpu=False, threads=1)
        )
        home: Any = SimpleNamespace(secret="")
        store: Any = Kept()
        self.news = asyncio.Event()
        self.kept: Kept = store
        self.beside: set[asyncio.Future[Any]] = set()
        super().__init__(record, home, store, changed=self.news.set, begin=self._beside)
        self._load, self._serve = load, serve

    def _beside(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.ensure_future(work)
        self.beside.add(task)
        task.add_done_callback(self.beside.discard)

    def _slot(self, deployment: Deployment, index: int) -> Slot:
        made = RehearsedSlot(
            deployment,
            index,
            self._home,
            self.record.needs,
            changed=self.news.set,
            next_epoch=self._next_epoch,
        )
        made.load, made.serve = self._load, self._serve
        return made


@asynccontextmanager
async def kept(keeper: Rehearsed) -> AsyncIterator[Rehearsed]:
    """Reconciled whenever anything happens, as the controller does it."""

    async def reconcile() -> None:
        while True:
            keeper.reconcile(NOTHING, frozenset())
            await keeper.news.wait()
            keeper.news.clear()

    reconciling = asyncio.ensure_future(reconcile())
    try:
        async with asyncio.timeout(60):
            yield keeper
    finally:
        reconciling.cancel()
        await keeper.end()


def test_a_slot_that_is_given_up_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only once all are is there nothing left to wait for, and the reason is told."""
    monkeypatch.setattr(restart, "_PAUSES", (0.0,))

    async def run() -> None:
        died = asyncio.Event()

        def load(index: int) -> None:
            if index == 0 or died.is_set():
                raise OutOfMemory(f"the weights of {index} do not fit")

        async def serve(index: int) -> None:
            await died.wait()
            raise EngineFailure("a worker process died")

        async with kept(Rehearsed(2, load, serve)) as keeper:
            await until(lambda: [slot.phase for slot in keeper.slots] == [Phase.FAILED, Phase.SERVING])
            table = keeper.served().table
            assert table.failure is None
            assert [entry.slot for entry in table.replicas] == [1]
            died.set()
            await until(lambda: keeper.served().table.failure is not None)
            assert keeper.served().table.failure == "the weights of 1 do not fit"
            starts = [slot.starts for slot in keeper.slots if isinstance(slot, RehearsedSlot)]
            assert starts == [1, 1 + restart._ATTEMPTS]
            keeper.change(keeper.record)  # the operator asks again
            await until(lambda: keeper.record.epoch == sum(starts) + 2)
            assert [slot.starts for slot in keeper.slots if isinstance(slot, RehearsedSlot)] == [1, 1]

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

    async def run() -> None:
        def starts() -> int:
            [slot] = keeper.slots
            assert isinstance(slot, RehearsedSlot)
            return slot.starts

        def load(index: int) -> None:
            clock.now += 1000.0
            if starts() == 2:
                raise EngineFailure("a worker process died")

        async def serve(index: int) -> None:
            clock.now += starts()
            if starts() < 4:
                raise EngineFailure("a worker process died")
            await asyncio.Event().wait()

        keeper = Rehearsed(1, load, serve)
        async with kept(keeper):
            await until(lambda: bool(keeper.slots) and starts() == 4)

    asyncio.run(run())
    assert told == [1.0, None, 3.0]


def test_a_slot_whose_place_cannot_be_given_back_is_kept_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's head may be gone for a moment."""
    monkeypatch.setattr(restart, "_PAUSES", (0.0,))
    removals = 0
    plain = RehearsedSlot._remove

    async def shaken(slot: RehearsedSlot) -> None:
        nonlocal removals
        removals += 1
        if removals % 2 == 0:
            raise ConnectionError("the head is gone")
        await plain(slot)

    monkeypatch.setattr(RehearsedSlot, "_remove", shaken)

    async def run() -> None:
        def load(index: int) -> None:
            raise EngineFailure("a worker process died")

        async def serve(index: int) -> None:
            raise AssertionError("nothing loads")

        async with kept(Rehearsed(1, load, serve)) as keeper:
            await until(lambda: keeper.served().table.failure is not None)
            assert keeper.served().table.failure == "a worker process died"
            assert [slot.starts for slot in keeper.slots if isinstance(slot, RehearsedSlot)] == [3]
            assert removals >= 5

    asyncio.run(run())


def test_who_waits_for_room_is_not_in_need_of_it_where_some_has_just_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a long drain: its room is about to be taken, and no other replica is drained for some."""
    clock, seen = Clock(), list[dict[int, float]]()

    def looked(replicas: int, slots: Sequence[SlotView]) -> list[tuple[Act, int]]:
        seen.append({slot.index: slot.seconds for slot in slots})
        return []

    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(keeper_module, "time", clock)
    monkeypatch.setattr(keeper_module, "actions", looked)

    async def run() -> None:
        keeper = Rehearsed(1, lambda index: None, lambda index: None)
        keeper.slots = [keeper._slot(keeper.deployment, index) for index in (0, 1)]
        for _ in range(2):
            clock.now += 300.0
            keeper.reconcile(NOTHING, frozenset())
        await keeper.slots[0].end()
        for _ in range(2):
            keeper.reconcile(NOTHING, frozenset())
            clock.now += 7.0

    asyncio.run(run())
    assert seen == [{0: 300.0, 1: 300.0}, {0: 600.0, 1: 600.0}, {1: 0.0}, {1: 7.0}]


def test_room_that_was_asked_for_by_who_has_ended_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray makes it in a thread, which goes on."""
    asked, allowed, given_back = threading.Event(), threading.Event(), list[str]()

    def make(bundles: list[Any], *, name: str, **_: Any) -> str:
        asked.set()
        assert allowed.wait(60)
        return name

    monkeypatch.setattr(module, "placement_group", make)
    monkeypatch.setattr(module, "remove_placement_group", given_back.append)

    async def run() -> None:
        deployment = Deployment("test", EngineConfig(model="none"), DeploymentConfig())
        making = asyncio.ensure_future(module.Placements("mine").make(deployment, Needs(gpu=False, threads=1)))
        assert await asyncio.to_thread(asked.wait, 60)
        making.cancel()
        with pytest.raises(asyncio.CancelledError):
            await making
        assert not given_back
        allowed.set()
        await until(lambda: len(given_back) == 1)

    asyncio.run(run())


def test_what_an_operator_says_meanwhile_is_kept() -> None:
    """Each start of a replica writes its epoch down: no word of an operator may be lost beside it."""

    async def run() -> None:
        async def serve(index: int) -> None:
            await asyncio.Event().wait()

        async with kept(Rehearsed(4, lambda index: None, serve)) as keeper:
            while not keeper.record.epoch:
                await asyncio.sleep(0)
            other = replace(keeper.deployment, config=DeploymentConfig(min_replicas=6))
            keeper.change(replace(keeper.record, deployment=other))
            await keeper.pin(5)
            await until(lambda: sum(slot.phase is Phase.SERVING for slot in keeper.slots) == 5 and not keeper.beside)
            assert (keeper.deployment, keeper.record.pinned, keeper.record.epoch) == (other, 5, 5)
            assert sorted(slot.epoch for slot in keeper.slots) == [1, 2, 3, 4, 5]
            assert keeper.kept.records["test"] == keeper.record

    asyncio.run(run())


def test_room_that_could_not_be_given_back_is_given_back_later() -> None:
    asked: list[str] = []

    class Placements:
        async def remove(self, name: str) -> None:
            asked.append(name)
            if len(asked) == 1:
                raise ConnectionError("Ray's head is away")

    async def run() -> None:
        home: Any = SimpleNamespace(placements=Placements())
        deployment = Deployment("a", EngineConfig(model="m"), DeploymentConfig())
        needs = Needs(gpu=False, threads=1)
        slot = Slot(deployment, 0, home, needs, changed=lambda: None, next_epoch=lambda: 1)
        slot._group = "room"
        with pytest.raises(ConnectionError):
            await slot._remove()
        for _ in range(2):
            await slot._remove()
        assert asked == ["room", "room"]

    asyncio.run(run())


def test_the_last_word_on_a_deployment_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is deployed again while the word of its end is still on its way."""
    there: dict[str, str] = {}

    def put(key: str, text: str, *, overwrite: bool) -> None:
        there[key] = text

    def delete(key: str) -> None:
        time.sleep(0.2)
        there.pop(key, None)

    monkeypatch.setattr(
        "quire_cluster.store.internal_kv", SimpleNamespace(_internal_kv_put=put, _internal_kv_del=delete)
    )
    deployment = Deployment("test", EngineConfig(model="none"), DeploymentConfig())
    record = Record(deployment=deployment, needs=Needs(gpu=False, threads=1))

    async def run() -> None:
        store = Store("c")
        await store.write(record)
        await asyncio.gather(store.delete("test"), store.write(record))

    asyncio.run(run())
    assert list(there) == ["quire:c:deployment:test"]
