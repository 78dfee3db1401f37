"""What requests are said to wait for: by a replica's engine, and by a gateway whose replicas answer, or do not."""

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gateways import TOKENS, expected, gateway, tokens, until
from quire_cluster.convert import sampling_to_proto
from quire_cluster.gateway.dispatcher import Dispatcher
from quire_cluster.gateway.generation import Generation, RequestFacts
from quire_cluster.gateway.waiting import ChoiceWait
from quire_cluster.replica import EngineService, EngineThread, session_server
from quire_cluster.routing_table import ReplicaEntry, RoutingTable
from quire_engine.config import EngineConfig, SchedulerLimits
from quire_engine.request import EngineSampling
from quire_engine.step import StepPlan, StepResult
from quire_engine.text.output import OutputText
from quire_engine.text.params import SamplingParams
from quire_engine.text.tokenizer import Tokenizer
from quire_engine.waiting import WaitsFor
from quire_engine.weights.resolve import find_model
from quire_protos.v1 import engine_pb2 as pb


def waiting_for(dispatcher: Dispatcher) -> Counter[str]:
    """What requests wait for, as a controller adds it up: at replicas, and here."""
    found = Counter({dispatcher.homeless_for: len(dispatcher.homeless)})
    for session in dispatcher.sessions:
        found.update(session.load.waiting_for)
    return +found


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Callable[[str], Path]) -> Tokenizer:
    return Tokenizer.load(find_model(EngineConfig(model=str(checkpoint("llama")))))


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas that answer are waited for, however busy this machine is."""
    monkeypatch.setattr("quire_cluster.gateway.dispatcher._ANSWER", 250.0)


class Executor:
    """Draws token 5, in no hurry."""

    failure = None
    limits = SchedulerLimits(
        vocab_size=300,
        num_pages=3000,
        block_size=16,
        max_model_len=20_000,
        max_num_seqs=2,
        max_num_batched_tokens=256,
        max_num_queued_reqs=8,
    )

    def __init__(self) -> None:
        self._plans: deque[StepPlan] = deque()

    def submit(self, plan: StepPlan) -> None:
        self._plans.append(plan)

    def collect(self) -> StepResult:
        time.sleep(0.005)
        return StepResult(np.full(int(self._plans.popleft().draws.sum()), 5, np.int32))


@asynccontextmanager
async def engine_and_gateway() -> AsyncIterator[Dispatcher]:
    """A dispatcher with a session to an engine of two rows."""
    workers: Any = Executor()
    engine = EngineThread(workers, asyncio.get_running_loop(), lambda error: None)
    server = session_server(EngineService(engine), "secret")
    port = server.add_insecure_port("127.0.0.1:0")
    dispatcher = Dispatcher(lambda s: None, lambda n: None, max_waiting=8)
    try:
        await server.start()
        engine.start()
        dispatcher.update_table(RoutingTable((ReplicaEntry(0, 1, f"127.0.0.1:{port}", 20_000, secret="secret"),)))
        await until(lambda: bool(dispatcher.sessions))
        yield dispatcher
    finally:
        await dispatcher.close()
        await server.stop(0)
        engine.stop()


def test_an_engine_says_through_its_sessions_what_requests_wait_for(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows, and five answers of three requests, which keep their order however long it takes to write them."""

    def slowly(sampling: EngineSampling) -> pb.EngineSampling:
        time.sleep(0.02)
        return sampling_to_proto(sampling)

    monkeypatch.setattr("quire_cluster.gateway.generation.sampling_to_proto", slowly)

    async def run() -> None:
        async with engine_and_gateway() as dispatcher:
            [session] = dispatcher.sessions
            start = time.monotonic()

            def send(name: str, size: int, n: int) -> Generation:
                facts = RequestFacts(name, [5] * size, 0, 0.0, b"", time.monotonic())
                texts = [OutputText(tokenizer, SamplingParams(), facts.prompt) for _ in range(n)]
                generation = Generation(facts, [EngineSampling(max_tokens=19_000)] * n, texts)
                dispatcher.submit(generation)
                return generation

            running, second, third = send("first", 10, 2), send("second", 20, 1), send("third", 30, 2)
            await until(lambda: all(len(choice.output) > 3 for choice in running.choices))
            reasons = {WaitsFor.ROW.value: 1, WaitsFor.EARLIER.value: 2}
            await until(lambda: dict(session.load.waiting_for) == reasons)
            assert session.load.queued_tokens in range(20 + 30 + 30, 20 + 30 + 30 + 3)
            await until(lambda: session.load.prefill_rate > 0)
            told, behind, last = await asyncio.gather(*(dispatcher.why(one) for one in (running, second, third)))
            assert [one.reason for one in told] == ["", ""]
            assert [one.index for one in told] == [0, 1]
            assert all(one.tokens > 3 for one in told)
            assert [one.reason for one in behind] == [WaitsFor.ROW.value]
            assert [one.reason for one in last] == [WaitsFor.EARLIER.value] * 2
            assert all(0 < one.since <= time.monotonic() - start for one in (*behind, *last))
            assert all(one.estimate is None for one in (*behind, *last)), "nobody knows when a row will be free"
            dispatcher.abort(running)
            await until(lambda: bool(third.choices[0].output))
            [one] = [one for one in await dispatcher.why(third) if one.index == 0]
            assert (one.reason, one.tokens > 0) == ("", True)
            for generation in (second, third):
                dispatcher.abort(generation)
            assert await dispatcher.why(third) == []
            await until(lambda: session.load.running + session.load.waiting == 0)
            assert (dict(session.load.waiting_for), session.load.queued_tokens) == ({}, 0)

    asyncio.run(run())


def held(submit: pb.Submit) -> bool:
    return True


def waits(reason: WaitsFor, *, ahead: int = 0) -> Callable[[int], pb.Waiting]:
    return lambda wire_id: pb.Waiting(id=wire_id, reason=reason.value, since=2.5, tokens_ahead=ahead)


def test_the_estimate_is_the_time_of_the_prompts_ahead(tokenizer: Tokenizer) -> None:
    """Where the replica has computed prompts before, and nothing there waits for others to end."""

    async def run() -> None:
        async with gateway(tokenizer, 1) as g:
            [replica] = g.replicas
            [session] = g.dispatcher.sessions
            replica.holds = held
            one = g.start([5, 6])

            async def told(reason: WaitsFor, rate: float, **others: int) -> ChoiceWait:
                replica.waits, replica.prefill_rate, replica.waiting_for = waits(reason, ahead=3000), rate, others
                await until(lambda: (session.load.prefill_rate, dict(session.load.waiting_for)) == (rate, others))
                [found] = await g.dispatcher.why(one)
                assert (found.reason, found.since) == (reason.value, 2.5)
                return found

            assert (await told(WaitsFor.BUDGET, 0.0)).estimate is None
            assert (await told(WaitsFor.BUDGET, 1500.0)).estimate == 2.0
            assert (await told(WaitsFor.EARLIER, 500.0, **{WaitsFor.BUDGET.value: 1})).estimate == 6.0
            assert (await told(WaitsFor.EARLIER, 500.0, **{WaitsFor.PAGES.value: 1})).estimate is None
            assert (await told(WaitsFor.ROW, 500.0)).estimate is None
            replica.holds = lambda submit: False
            assert await tokens(one) == expected([5, 6])
            assert await g.dispatcher.why(one) == []

    asyncio.run(run())


def test_a_choice_is_asked_for_once_and_after_it_was_sent(tokenizer: Tokenizer) -> None:
    """However many want to know. 200 submissions take several messages."""

    async def run() -> None:
        async with gateway(tokenizer, 1) as g:
            [replica] = g.replicas
            replica.holds, replica.waits = held, waits(WaitsFor.PAGES)
            many = [g.start([5, number], 2) for number in range(100)]
            found = await asyncio.gather(*(g.dispatcher.why(one) for one in many for _ in range(3)))
            assert len(replica.submitted) == 200
            assert sorted(replica.questions) == sorted(submit.id for submit in replica.submitted)
            assert [[wait.index for wait in one] for one in found] == [[0, 1]] * 300
            assert {wait.reason for one in found for wait in one} == {WaitsFor.PAGES.value}

    asyncio.run(run())


def test_a_replica_that_does_not_answer_is_not_waited_for(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor one that dies meanwhile: its requests are said to be where they go then."""

    async def run() -> None:
        async with gateway(tokenizer, 1) as g:
            [replica] = g.replicas
            replica.holds, replica.waits = held, lambda wire_id: None
            one = g.start([5, 6])
            await until(lambda: one.choices[0].times.started is not None)
            with monkeypatch.context() as hurried:
                hurried.setattr("quire_cluster.gateway.dispatcher._ANSWER", 0.05)
                [found] = await g.dispatcher.why(one)
            assert found.reason == WaitsFor.WORD.value
            assert found.since > 0
            asking = asyncio.ensure_future(g.dispatcher.why(one))
            await asyncio.sleep(0)
            replica.die()
            async with asyncio.timeout(60):
                [found] = await asking
            assert (found.reason, found.tokens) == (WaitsFor.REPLICA.value, 0)
            asking = asyncio.ensure_future(g.dispatcher.why(one))
            assert [found.reason for found in await asking] == [WaitsFor.REPLICA.value]
            assert waiting_for(g.dispatcher) == {WaitsFor.REPLICA.value: 1}
            replica.holds, replica.alive = lambda submit: False, True
            assert await tokens(one) == expected([5, 6])
            assert waiting_for(g.dispatcher) == {}

    asyncio.run(run())


def test_what_is_held_back_by_a_suspect_says_so(tokenizer: Tokenizer) -> None:
    """The only replica is tried with what may have killed it."""

    async def run() -> None:
        async with gateway(tokenizer, 1) as g:
            [replica] = g.replicas
            replica.deadly = lambda submit, length: replica.deaths == 0
            suspect = g.start([5, 6])
            await until(lambda: bool(replica.deaths) and not g.dispatcher.sessions)
            replica.holds, replica.alive = held, True
            await until(lambda: len(replica.submitted) == 2)
            new = g.start([7, 8], 3)
            found = await g.dispatcher.why(new)
            assert [wait.reason for wait in found] == [WaitsFor.UNSUSPECTED.value] * 3
            assert waiting_for(g.dispatcher) == {WaitsFor.UNSUSPECTED.value: 3}
            assert [wait.reason for wait in await g.dispatcher.why(suspect)] == [""]
            replica.holds = lambda submit: False
            assert await tokens(suspect) == expected([5, 6])
            assert await tokens(new) == expected([7, 8])
            assert len(new.choices[2].output) == TOKENS

    asyncio.run(run())
