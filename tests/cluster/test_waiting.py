"""How long a gateway waits for a replica that is gone, and how often it asks for it."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_replica import FakeReplica
from quire_cluster.gateway import dispatcher as dispatching
from quire_cluster.gateway import sessions
from quire_cluster.gateway.dispatcher import Dispatcher
from quire_cluster.gateway.generation import Generation, RequestFacts
from quire_cluster.policies.suspicion import Patience
from quire_cluster.routing_table import Key, ReplicaEntry, RoutingTable
from quire_engine.config import EngineConfig
from quire_engine.errors import DeadlineExceeded, Unavailable
from quire_engine.request import EngineSampling
from quire_engine.text.output import OutputText
from quire_engine.text.params import SamplingParams
from quire_engine.text.tokenizer import Tokenizer
from quire_engine.weights.resolve import find_model


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Callable[[str], Path]) -> Tokenizer:
    return Tokenizer.load(find_model(EngineConfig(model=str(checkpoint("llama")))))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


def test_what_waits_for_a_replica_waits_as_long_as_one_takes_to_load(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The replicas of the other gateway load at once, and are not waited for."""
    monkeypatch.setattr("quire_cluster.policies.admission._LEAST_WAIT", 0.3)
    monkeypatch.setattr(dispatching, "_TICK", 0.02)

    async def waiting(load_seconds: float) -> tuple[Dispatcher, Generation]:
        replica = await FakeReplica().start()
        dispatcher = Dispatcher(lambda s: None, lambda n: None, max_waiting=8)
        dispatcher.update_table(RoutingTable((replica.entry(load_seconds=load_seconds),)))
        await until(lambda: bool(dispatcher.sessions))
        await replica.stop()
        await until(lambda: not dispatcher.sessions)
        facts = RequestFacts("request", [5, 6], 0, 0.0, b"", time.monotonic())
        generation = Generation(facts, [EngineSampling()], [OutputText(tokenizer, SamplingParams(), [5, 6])])
        dispatcher.submit(generation)
        return dispatcher, generation

    async def run() -> None:
        patient, first = await waiting(1000.0)
        impatient, second = await waiting(0.01)
        async with asyncio.timeout(60):
            with pytest.raises(Unavailable, match="no replica came back in time"):
                await second.admitted()
        assert not first.choices[0].ended
        assert list(patient._homeless) == first.choices
        assert not (impatient._place or impatient._homeless or impatient._suspects)
        await patient.close()
        await impatient.close()

    asyncio.run(run())


def test_whatever_a_look_at_replicas_raises_the_next_one_comes(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what waits would wait for ever."""
    monkeypatch.setattr(dispatching, "_TICK", 0.02)
    told: list[Key] = []

    def fail(key: Key) -> None:
        told.append(key)
        raise RuntimeError("the controller is gone")

    async def run() -> None:
        replica = await FakeReplica().start()
        dispatcher = Dispatcher(lambda s: None, lambda n: None, max_waiting=8, patience=Patience(avoid=0.5, move=1.0))
        dispatcher.on_silence = fail
        dispatcher.update_table(RoutingTable((replica.entry(),)))
        await until(lambda: bool(dispatcher.sessions))
        replica.silent = True
        await until(lambda: bool(told))
        facts = RequestFacts("request", [5, 6], 0, time.monotonic() + 0.1, b"", time.monotonic())
        generation = Generation(facts, [EngineSampling()], [OutputText(tokenizer, SamplingParams(), [5, 6])])
        await until(lambda: not dispatcher.sessions)
        dispatcher.submit(generation)
        async with asyncio.timeout(60):
            with pytest.raises(DeadlineExceeded):
                await generation.admitted()
        await dispatcher.close()
        await replica.stop()

    asyncio.run(run())


def test_who_does_not_answer_is_asked_less_and_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as it is in the table."""
    pauses: list[float] = []
    plain = asyncio.sleep

    class Asyncio:
        @staticmethod
        async def sleep(seconds: float) -> None:
            pauses.append(seconds)
            await plain(0)

        def __getattr__(self, name: str) -> Any:
            return getattr(asyncio, name)

    monkeypatch.setattr(sessions, "asyncio", Asyncio())

    async def run() -> None:
        replica = await FakeReplica().start()
        await replica.stop()
        dispatcher = Dispatcher(lambda s: None, lambda n: None, max_waiting=8)
        dispatcher.update_table(RoutingTable((ReplicaEntry(0, 1, f"127.0.0.1:{replica.port}", 4096),)))
        await until(lambda: len(pauses) >= 9)
        dispatcher.update_table(RoutingTable(()))
        await until(lambda: not dispatcher._sessions)
        await dispatcher.close()

    asyncio.run(run())
    assert pauses[:3] == sorted(set(pauses[:3]))
    assert pauses[7] == pauses[8] == max(pauses) <= 5.0
