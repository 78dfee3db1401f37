"""Sessions of gateways with replicas: opened again, bounded, watched."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from fake_replica import token_at
from gateways import PROMPTS, SHORT, TOKENS, expected, gateway, tokens, until
from quire_cluster.convert import BATCH_BYTES, KEEPALIVE
from quire_cluster.gateway.dispatcher import Dispatcher
from quire_cluster.gateway.generation import Generation, RequestFacts
from quire_cluster.policies.suspicion import Patience
from quire_cluster.replica import EngineService, EngineThread, merged, session_server
from quire_cluster.routing_table import ReplicaEntry, RoutingTable
from quire_engine.config import SchedulerLimits
from quire_engine.errors import (
    EngineFailure,
    InvalidParameter,
)
from quire_engine.request import EngineSampling, Request, TokenSet
from quire_engine.text.output import OutputText
from quire_engine.text.params import SamplingParams
from quire_engine.text.tokenizer import Tokenizer
from quire_protos.v1 import engine_pb2 as pb
from quire_protos.v1 import engine_pb2_grpc


def test_a_broken_session_is_opened_again(tokenizer: Tokenizer) -> None:
    """Its replica lives, and is in the table: what broke was the connection."""

    async def run() -> None:
        async with gateway(tokenizer, 1) as g:
            [replica] = g.replicas
            for _ in range(3):
                running = [g.start(prompt) for prompt in PROMPTS]
                await until(lambda: len(replica.submitted) >= len(PROMPTS))
                replica.submitted.clear()
                replica.die()
                await until(lambda: not g.dispatcher.sessions)
                replica.alive = True
                assert [await tokens(one) for one in running] == [expected(prompt) for prompt in PROMPTS]
            assert replica.num_sessions == 4

    asyncio.run(run())


def test_a_replica_that_vanishes_without_a_word_is_avoided_and_then_left(tokenizer: Tokenizer) -> None:
    async def run() -> None:
        async with gateway(tokenizer, patience=SHORT) as g:
            first, second = g.replicas
            running = [g.start(prompt) for prompt in PROMPTS]
            await until(lambda: bool(first.submitted and second.submitted))
            first.silent = True
            await until(lambda: any(session.as_load().avoided for session in g.dispatcher.sessions))
            before = len(first.submitted)
            later = [g.start(prompt) for prompt in PROMPTS]
            assert [await tokens(one) for one in later] == [expected(prompt) for prompt in PROMPTS]
            assert len(first.submitted) == before, "nothing new went there"
            assert [await tokens(one) for one in running] == [expected(prompt) for prompt in PROMPTS]
            assert g.silent[0] == first.entry().key, "whoever can kill it was told"
            g.table(second)
            first.silent = False
            await until(lambda: len(g.dispatcher.sessions) == 1)
            assert await tokens(g.start([9, 9])) == expected([9, 9])

    asyncio.run(run())


def test_a_replica_that_sends_nothing_takes_pings_all_the_same() -> None:
    """gRPC's own limit is three of them in five minutes. The times are shortened, but for that of the answer."""
    shortened = {"grpc.keepalive_time_ms": 300, "grpc.http2.min_ping_interval_without_data_ms": 60}
    options = [(name, shortened.get(name, value)) for name, value in KEEPALIVE]

    class Silent(engine_pb2_grpc.EngineServicer):
        async def Session(self, requests: Any, context: Any) -> AsyncIterator[pb.SessionUpdate]:
            yield pb.SessionUpdate()
            await asyncio.Event().wait()

    async def run() -> None:
        server = grpc.aio.server(options=options)
        engine_pb2_grpc.add_EngineServicer_to_server(Silent(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
            session = engine_pb2_grpc.EngineStub(channel).Session()
            await session.read()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(session.read(), 4)
        await server.stop(0)

    asyncio.run(run())


def test_no_message_is_too_large(tokenizer: Tokenizer) -> None:
    """128 choices of a long prompt, each with its own log, and with nearly every token allowed."""

    async def run() -> None:
        async with gateway(tokenizer, 1) as g:
            [replica] = g.replicas
            long = [70_000 + number for number in range(60_000)]
            allowed = TokenSet.of(range(0, 300_000, 2))
            generation = g.start(long, 128, max_tokens=1, allowed_token_ids=allowed)
            assert await tokens(generation) == [token_at(long, 0)]
            assert len(replica.submitted) == 128
            assert max(replica.message_sizes) < 4 << 20
            assert replica.num_sessions == 1

    asyncio.run(run())


def test_many_small_requests_are_not_written_at_once(tokenizer: Tokenizer) -> None:
    """Each takes the event loop for a while, however few bytes it has."""

    async def run() -> None:
        async with gateway(tokenizer, 1) as g:
            [replica] = g.replicas
            words = tuple((4 + number, 5) for number in range(500))
            generation = g.start([5, 6], 128, max_tokens=1, bad_words=words)
            assert await tokens(generation) == [token_at([5, 6], 0)]
            assert len(replica.submitted) == 128
            size = replica.submitted[0].ByteSize()
            assert max(replica.message_sizes) < 40 * size

    asyncio.run(run())


def test_a_request_too_large_for_any_message_is_refused_alone(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quire_cluster.gateway.sessions._LARGEST_SUBMIT", 10_000)

    async def run() -> None:
        async with gateway(tokenizer, 1) as g:
            beside = g.start([5, 6])
            with pytest.raises(InvalidParameter, match="at most 10000 reach a replica"):
                await g.start([300] * 9000).admitted()
            assert await tokens(beside) == expected([5, 6])

    asyncio.run(run())


def test_a_request_that_cannot_be_written_down_fails_alone(tokenizer: Tokenizer) -> None:
    async def run() -> None:
        async with gateway(tokenizer, 1) as g:
            beside = g.start([5, 6])
            with pytest.raises(EngineFailure, match="cannot be sent"):
                await g.start([7], max_tokens=1 << 40).admitted()
            assert await tokens(beside) == expected([5, 6])
            assert g.replicas[0].num_sessions == 1

    asyncio.run(run())


def test_a_gateway_that_lags_gets_messages_of_bounded_size() -> None:
    """All of what waited, in its order."""
    waiting: asyncio.Queue[pb.SessionUpdate | None] = asyncio.Queue()
    sent = [pb.SessionUpdate(ids=[1], indexes=[index], tokens=[7]) for index in range(100)]
    for number in range(0, 100, 10):
        scores = pb.TopLogprobs(id=1, top_logprobs=[0.5] * 100_000)
        sent[number].logprobs.append(scores)
    for update in sent:
        waiting.put_nowait(pb.SessionUpdate.FromString(update.SerializeToString()))
    got = []
    while not waiting.empty():
        first = waiting.get_nowait()
        assert first is not None
        got.append(merged(first, waiting))
    assert 1 < len(got) < 10
    assert max(update.ByteSize() for update in got) < 2 * BATCH_BYTES
    assert [index for update in got for index in update.indexes] == list(range(100))
    assert sum(len(update.logprobs) for update in got) == 10


def test_what_a_stop_string_ends_is_ended_at_its_replica(tokenizer: Tokenizer) -> None:
    """While the other choice of the same request goes on there."""

    async def run() -> None:
        async with gateway(tokenizer, 1) as g:
            [replica] = g.replicas
            prompt = [5, 6]
            params = SamplingParams(stop=f"w{token_at(prompt, 2)}"), SamplingParams()
            texts = [OutputText(tokenizer, one, prompt) for one in params]
            facts = RequestFacts("request", prompt, 0, 0.0, b"", time.monotonic())
            generation = Generation(facts, [EngineSampling(max_tokens=TOKENS)] * 2, texts)
            g.dispatcher.submit(generation)
            assert await tokens(generation) == expected(prompt)[:3]
            assert generation.choices[1].output == expected(prompt)
            await until(lambda: replica.aborted == [replica.submitted[0].id])

    asyncio.run(run())


def test_half_of_a_session_is_none(tokenizer: Tokenizer) -> None:
    """A replica whose heartbeat fails: the gateway opens another session, instead of taking it for one that hangs."""

    class Engine:
        """What the service asks of an engine's thread."""

        reports = 0

        def load(self) -> pb.Load:
            self.reports += 1
            if self.reports == 3:
                raise ValueError("a bug")
            return pb.Load(most_requests=8)

        def put(self, action: Callable[[], None]) -> None:
            pass

    async def run() -> None:
        engine: Any = Engine()
        server = session_server(EngineService(engine), "secret")
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        endless = Patience(avoid=1e9, move=1e9)
        dispatcher = Dispatcher(lambda s: None, lambda n: None, max_waiting=8, patience=endless)
        entry = ReplicaEntry(0, 1, f"127.0.0.1:{port}", 4096, secret="secret")
        dispatcher.update_table(RoutingTable((entry,)))
        await until(lambda: engine.reports > 5)
        await dispatcher.close()
        await server.stop(0)

    asyncio.run(run())


def test_a_report_between_two_moments_of_the_engine() -> None:
    """Its thread may have given back a request's pages, and not yet said that nothing is computed."""

    async def run() -> None:
        limits = SchedulerLimits(
            vocab_size=300,
            num_pages=8,
            block_size=16,
            max_model_len=99,
            max_num_seqs=4,
            max_num_batched_tokens=64,
            max_num_queued_reqs=8,
        )
        workers: Any = SimpleNamespace(limits=limits)
        engine = EngineThread(workers, asyncio.get_running_loop(), lambda error: None)
        request = Request(1, [5], 1, EngineSampling(max_tokens=1))
        request.num_computed = 1
        engine._engine.scheduler.running.append(request)
        assert engine.load().slots_unused == 0

    asyncio.run(run())
