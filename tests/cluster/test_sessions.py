"""What gateways do when replicas vanish, fall silent, or die of a request: over real sockets, without a model."""

import asyncio
import gc
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import httpx
import pytest
from fake_replica import FakeReplica, token_at
from quire_cluster.config import ServeConfig
from quire_cluster.convert import BATCH_BYTES, KEEPALIVE
from quire_cluster.gateway.connection import HttpServer
from quire_cluster.gateway.dispatcher import Dispatcher
from quire_cluster.gateway.generation import Generation, RequestFacts
from quire_cluster.gateway.grpc_api import GrpcServer
from quire_cluster.gateway.http import Api
from quire_cluster.gateway.service import Service
from quire_cluster.liveness import LivenessProbe
from quire_cluster.policies.suspicion import Patience
from quire_cluster.replica import EngineService, EngineThread, merged, session_server
from quire_cluster.routing_table import Key, ReplicaEntry, RoutingTable
from quire_cluster.serve import Server
from quire_engine.config import EngineConfig, SchedulerLimits
from quire_engine.errors import (
    DeadlineExceeded,
    EngineFailure,
    InvalidParameter,
    PoisonRequest,
    QueueFull,
    ServerError,
    Unavailable,
)
from quire_engine.request import EngineSampling, Request, TokenSet
from quire_engine.text.output import OutputText
from quire_engine.text.params import SamplingParams
from quire_engine.text.tokenizer import Tokenizer
from quire_engine.weights.resolve import find_model
from quire_protos.v1 import engine_pb2 as pb
from quire_protos.v1 import engine_pb2_grpc

TOKENS = 30
PROMPTS = [[5 + number, 17, 30] for number in range(16)]
LONG = Patience()
SHORT = Patience(avoid=0.5, move=1.0)


@pytest.fixture(scope="module")
def service(checkpoint: Callable[[str], Path]) -> Callable[[], Service]:
    """A gateway of the tiny model, without a replica yet."""
    config = EngineConfig(model=str(checkpoint("llama")), max_num_queued_reqs=8)
    files = find_model(config)
    tokenizer = Service.load(files, config, names=["tiny"], chat_template=None).tokenizer
    return lambda: Service(files, tokenizer, names=["tiny"], max_model_len=4096, max_waiting=8)


@pytest.fixture(scope="module")
def tokenizer(service: Callable[[], Service]) -> Tokenizer:
    return service().tokenizer


class Gateway:
    """A dispatcher over fake replicas."""

    def __init__(self, tokenizer: Tokenizer, replicas: list[FakeReplica], patience: Patience, max_waiting: int) -> None:
        self.dispatcher = Dispatcher(lambda s: None, lambda n: None, max_waiting=max_waiting, patience=patience)
        self.replicas = replicas
        self.silent: list[Key] = []
        self.dispatcher.on_silence = self.silent.append
        self._tokenizer = tokenizer
        self._version = 0
        self._started = 0

    def table(self, *replicas: FakeReplica, load_seconds: float = 0.0) -> None:
        """What the controller says is there."""
        self._version += 1
        entries = tuple(replica.entry(load_seconds=load_seconds) for replica in replicas)
        self.dispatcher.update_table(RoutingTable(self._version, entries))

    def start(self, prompt: list[int], n: int = 1, *, deadline: float = 0.0, **sampling: Any) -> Generation:
        """Sends a request off."""
        self._started += 1
        facts = RequestFacts(f"request-{self._started}", prompt, 0, deadline, b"", time.monotonic())
        asked = EngineSampling(**({"max_tokens": TOKENS} | sampling))
        texts = [OutputText(self._tokenizer, SamplingParams(), prompt) for _ in range(n)]
        generation = Generation(facts, [asked] * n, texts)
        self.dispatcher.submit(generation)
        return generation


@asynccontextmanager
async def gateway(
    tokenizer: Tokenizer, count: int = 2, *, patience: Patience = LONG, max_waiting: int = 8, **options: Any
) -> AsyncIterator[Gateway]:
    replicas = [await FakeReplica(**options).start() for _ in range(count)]
    made = Gateway(tokenizer, replicas, patience, max_waiting)
    made.table(*replicas)
    await until(lambda: len(made.dispatcher.sessions) == count)
    try:
        yield made
    finally:
        await made.dispatcher.close()
        await asyncio.gather(*(replica.stop() for replica in replicas))


async def until(condition: Callable[[], bool], limit: float = 300.0) -> None:
    async with asyncio.timeout(limit):
        while not condition():
            await asyncio.sleep(0.005)


async def tokens(generation: Generation) -> list[int]:
    """Of its first choice. Raises what it ended with."""
    async with asyncio.timeout(300):
        while await generation.deltas():
            pass
    for choice in generation.choices:
        if choice.error is not None:
            raise choice.error
    return generation.choices[0].output


def expected(prompt: list[int]) -> list[int]:
    return [token_at(prompt, index) for index in range(TOKENS)]


# ---- sessions -----------------------------------------------------------------------------------------------------


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


# ---- poison -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kills_at", [0, 1, 12])
@pytest.mark.parametrize("last_words", ["a worker process died", ""])
def test_what_kills_replicas_ends_and_what_ran_beside_it_goes_on(
    tokenizer: Tokenizer, kills_at: int, last_words: str
) -> None:
    """Whether at its start or at a later token: replicas are brought back, as a controller does, and few have died."""

    async def run() -> None:
        async with gateway(tokenizer, 3) as g:

            async def bring_back() -> None:
                while True:
                    await asyncio.sleep(0.7)
                    for replica in g.replicas:
                        replica.alive = True

            controller = asyncio.ensure_future(bring_back())
            for replica in g.replicas:
                replica.deadly = lambda submit, index: submit.prompt[0] == 99 and index == kills_at
                replica.last_words = last_words
            running = [g.start(prompt) for prompt in PROMPTS[:8]]
            poison = g.start([99, 1])
            running += [g.start(prompt) for prompt in PROMPTS[8:]]
            with pytest.raises(PoisonRequest, match="two replicas died"):
                await tokens(poison)
            assert [await tokens(one) for one in running] == [expected(prompt) for prompt in PROMPTS]
            assert sum(replica.deaths for replica in g.replicas) <= (3 if last_words else 4)
            controller.cancel()

    asyncio.run(run())


@pytest.mark.parametrize("replicas", [1, 3])
def test_poison_beside_a_trial_convicts_nobody_else(tokenizer: Tokenizer, replicas: int) -> None:
    """Others that kill come all the time, while what a replica was lost under is tried."""

    async def run() -> None:
        async with gateway(tokenizer, replicas, max_waiting=100) as g:

            async def bring_back() -> None:
                while True:
                    await asyncio.sleep(0.2)
                    for replica in g.replicas:
                        replica.alive = True

            controller = asyncio.ensure_future(bring_back())
            for replica in g.replicas:
                replica.deadly = lambda submit, index: submit.prompt[0] >= 99
            running, poisons = [], []
            for number in range(8):
                running += [g.start(prompt) for prompt in PROMPTS[2 * number : 2 * number + 2]]
                poisons.append(g.start([99 + number, 1]))
                deaths = sum(replica.deaths for replica in g.replicas)
                await until(lambda deaths=deaths: sum(replica.deaths for replica in g.replicas) > deaths)
            for poison in poisons:
                with pytest.raises(PoisonRequest):
                    await tokens(poison)
            assert [await tokens(one) for one in running] == [expected(prompt) for prompt in PROMPTS]
            controller.cancel()

    asyncio.run(run())


def test_a_suspect_beside_what_is_as_suspicious_is_not_convicted(tokenizer: Tokenizer) -> None:
    """There is only one replica left to send it to, where something else has just come; and that one is lost too."""

    async def run() -> None:
        async with gateway(tokenizer) as g:
            for replica in g.replicas:
                replica.holds = lambda submit: True
            other = g.start(PROMPTS[0])
            await until(lambda: any(replica.submitted for replica in g.replicas))
            there, alone = sorted(g.replicas, key=lambda replica: not replica.submitted)
            suspect = g.start(PROMPTS[1])
            await until(lambda: bool(alone.submitted and suspect.choices[0].times.started))
            alone.die("a worker process died")
            await until(lambda: len(there.submitted) == 2 and len(there._running) == 2)
            there.die("a worker process died")
            await until(lambda: not g.dispatcher.sessions)
            for replica in g.replicas:
                replica.holds = lambda submit: False
                replica.alive = True
            assert [await tokens(one) for one in (other, suspect)] == [expected(prompt) for prompt in PROMPTS[:2]]

    asyncio.run(run())


def test_replicas_that_vanish_together_convict_nobody(tokenizer: Tokenizer) -> None:
    """Their host died, or the controller: everything waits and goes on."""

    async def run() -> None:
        async with gateway(tokenizer) as g:
            running = [g.start(prompt) for prompt in PROMPTS]
            await until(lambda: all(one.choices[0].output for one in running))
            g.replicas[0].die()
            await until(lambda: any(one.choices[0].epoch == 2 for one in running))
            g.replicas[1].die()
            await until(lambda: not g.dispatcher.sessions)
            for replica in g.replicas:
                replica.alive = True
            assert [await tokens(one) for one in running] == [expected(prompt) for prompt in PROMPTS]

    asyncio.run(run())


# ---- resumption ---------------------------------------------------------------------------------------------------


def test_what_was_admitted_is_resumed_exactly(tokenizer: Tokenizer) -> None:
    """As such (no queue is too full for it), with its log, what is left of its time, and in the order of arrival."""

    async def run() -> None:
        async with gateway(tokenizer, 1) as g:
            [replica] = g.replicas
            replica.holds = lambda submit: True
            until_when = time.monotonic() + 1000
            first = [g.start(prompt, deadline=until_when) for prompt in PROMPTS[:5]]
            for one in first:
                await one.admitted()
            replica.most_requests = 0  # its queue is full of others' requests
            replica.die()
            await until(lambda: not g.dispatcher.sessions)
            new = [g.start(prompt) for prompt in PROMPTS[5:8]]
            replica.submitted.clear()
            replica.holds = lambda submit: False
            replica.alive = True
            assert [await tokens(one) for one in first + new] == [expected(prompt) for prompt in PROMPTS[:8]]
            again = {tuple(submit.prompt): submit for submit in replica.submitted}
            assert all(again[tuple(prompt)].resumed for prompt in PROMPTS[:5])
            assert not any(again[tuple(prompt)].resumed for prompt in PROMPTS[5:8])
            assert all(0 < again[tuple(prompt)].time_left <= 1000 for prompt in PROMPTS[:5])
            assert all(submit.time_left == 0 for submit in replica.submitted if not submit.resumed)
            order = [tuple(submit.prompt) for submit in replica.submitted]
            for these in (PROMPTS[:5], PROMPTS[5:8]):
                places = [order.index(tuple(prompt)) for prompt in these]
                assert places == sorted(places)
            assert min(submit.age for submit in replica.submitted) > 0

    asyncio.run(run())


def test_what_waits_for_a_replica_is_bounded_and_ends(tokenizer: Tokenizer) -> None:
    async def run() -> None:
        async with gateway(tokenizer, 1) as g:
            [replica] = g.replicas
            replica.die()
            await until(lambda: not g.dispatcher.sessions)
            waiting = [g.start(prompt) for prompt in PROMPTS[:7]]
            hurried = g.start([5, 5], deadline=time.monotonic() + 0.1)
            with pytest.raises(Unavailable, match="8 requests wait"):
                g.start([6, 6])
            with pytest.raises(DeadlineExceeded):
                await tokens(hurried)
            g.dispatcher.give_up("no replica could be started: the disk is gone")
            for one in waiting:
                with pytest.raises(Unavailable, match="the disk is gone"):
                    await tokens(one)
            assert g.dispatcher.num_live == 0

    asyncio.run(run())


def test_who_waits_for_a_replica_is_told_in_time_that_none_came(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quire_cluster.policies.admission._LEAST_WAIT", 0.3)

    async def run() -> None:
        async with gateway(tokenizer, 1) as g:
            g.replicas[0].die()
            await until(lambda: not g.dispatcher.sessions)
            for one in [g.start(prompt) for prompt in PROMPTS[:3]]:
                with pytest.raises(Unavailable, match="came back in time"):
                    await tokens(one)

    asyncio.run(run())


def test_a_replica_that_drains_is_asked_once(tokenizer: Tokenizer) -> None:
    async def run() -> None:
        async with gateway(tokenizer) as g:
            first, second = g.replicas
            first.refuses = lambda submit: pb.Ending(
                id=submit.id, reason="error", error_kind="Unavailable", error="this replica is draining"
            )
            running = [g.start(prompt) for prompt in PROMPTS]
            assert [await tokens(one) for one in running] == [expected(prompt) for prompt in PROMPTS]
            assert len(second.submitted) == len(PROMPTS)
            assert len(first.submitted) <= len(PROMPTS)

    asyncio.run(run())


# ---- over HTTP ----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def http(service: Service, **options: Any) -> AsyncIterator[tuple[httpx.AsyncClient, FakeReplica]]:
    replica = await FakeReplica(**options).start()
    app = Api(service).app()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        assert (await client.get("/health")).status_code == 200, "it is starting"
        assert (await client.get("/ready")).status_code == 503
        service.dispatcher.update_table(RoutingTable(1, (replica.entry(),)))
        await until(lambda: service.ready)
        try:
            async with asyncio.timeout(120):
                yield client, replica
        finally:
            await service.dispatcher.close()
            await replica.stop()


def body(prompt: Any, *, stream: bool) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": TOKENS, "stream": stream}


@pytest.mark.parametrize("stream", [True, False])
def test_at_overload_the_gateway_refuses_before_sending(service: Callable[[], Service], stream: bool) -> None:
    async def run() -> None:
        async with http(service(), most_requests=3) as (client, replica):
            replica.holds = lambda submit: True
            busy = [
                asyncio.ensure_future(client.post("/v1/completions", json=body(prompt, stream=stream)))
                for prompt in PROMPTS[:3]
            ]
            await until(lambda: len(replica.submitted) == 3)
            for one_more in (PROMPTS[4], PROMPTS[4:6]):
                answer = await client.post("/v1/completions", json=body(one_more, stream=stream))
                assert answer.status_code == 429, answer.text
                assert answer.headers["retry-after"] == "1"
                assert answer.json()["error"]["type"] == "rate_limit_error"
            assert len(replica.submitted) == 3, "nothing of it was sent"
            replica.holds = lambda submit: False
            assert [(await one).status_code for one in busy] == [200] * 3
            assert (await client.post("/v1/completions", json=body(PROMPTS[4], stream=stream))).status_code == 200

    asyncio.run(run())


@pytest.mark.parametrize("first", ["holds", "ponders"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_refused_second_prompt_refuses_the_call_at_once(
    service: Callable[[], Service], stream: bool, first: str
) -> None:
    """While the first one runs, or waits to be taken, and would for ever."""

    async def run() -> None:
        async with http(service()) as (client, replica):
            setattr(replica, first, lambda submit: submit.prompt[0] == PROMPTS[0][0])
            refusal = {"reason": "error", "error_kind": QueueFull.__name__, "error": "too many wait"}
            replica.refuses = lambda submit: (
                pb.Ending(id=submit.id, **refusal) if submit.prompt[0] == PROMPTS[1][0] else None
            )
            answer = await client.post("/v1/completions", json=body(PROMPTS[:2], stream=stream))
            assert (answer.status_code, answer.json()["error"]["message"]) == (429, "too many wait")
            [other] = [submit for submit in replica.submitted if submit.prompt[0] == PROMPTS[0][0]]
            await until(lambda: other.id in replica.aborted)

    asyncio.run(run())


def test_headers_of_many_prompts_wait_for_their_admission_alone(service: Callable[[], Service]) -> None:
    """256 of them: each is accepted, and none gets further."""

    async def run() -> None:
        gate = service()
        async with http(gate) as (_, replica):
            replica.holds = lambda submit: True
            app = Api(gate).app()
            begun, left = asyncio.Event(), asyncio.Event()
            content = httpx.Request("POST", "http://x", json=body(PROMPTS * 16, stream=True)).content
            messages = iter([{"type": "http.request", "body": content, "more_body": False}])

            async def receive() -> Any:
                if (message := next(messages, None)) is not None:
                    return message
                await left.wait()
                return {"type": "http.disconnect"}

            async def send(message: Any) -> None:
                assert message["type"] == "http.response.start"
                assert message["status"] == 200
                begun.set()

            scope = {
                "type": "http",
                "method": "POST",
                "path": "/v1/completions",
                "headers": [],
                "query_string": b"",
                "http_version": "1.1",
                "scheme": "http",
            }
            call = asyncio.ensure_future(app(scope, receive, send))
            async with asyncio.timeout(300):
                await begun.wait()
            assert len(replica.submitted) == 256
            left.set()
            await call
            await until(lambda: len(replica.aborted) == 256)

    asyncio.run(run())


def test_health_and_readiness_follow_the_replicas(service: Callable[[], Service]) -> None:
    async def run() -> None:
        gate = service()
        async with http(gate) as (client, replica):
            assert (await client.get("/health")).json() == {"status": "ok"}
            assert (await client.get("/ready")).status_code == 200
            replica.die()
            await until(lambda: not gate.ready)
            answer = await client.get("/health")
            assert (answer.status_code, answer.json()) == (503, {"status": "no replica"})
            assert (await client.get("/ready")).status_code == 503
            replica.alive = True
            await until(lambda: gate.ready)
            assert (await client.get("/health")).status_code == 200
            second = await FakeReplica().start()
            table = RoutingTable(2, (replica.entry(), second.entry()))
            gate.dispatcher.update_table(table)
            await until(lambda: len(gate.dispatcher.sessions) == 2)
            await second.stop()
            await until(lambda: len(gate.dispatcher.sessions) == 1)
            assert (await client.get("/health")).status_code == 200, "it may come back"

    asyncio.run(run())


def test_health_says_which_replica_is_gone_silent_or_stalled(
    service: Callable[[], Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quire_cluster.gateway.service._SILENCE", 0.5)
    monkeypatch.setattr("quire_cluster.policies.admission._LEAST_WAIT", 0.3)

    async def run() -> None:
        gate = service()
        async with http(gate) as (client, replica):
            second = await FakeReplica().start()
            gate.dispatcher.update_table(RoutingTable(2, (replica.entry(), second.entry())))
            await until(lambda: len(gate.dispatcher.sessions) == 2)

            async def becomes(status: str) -> None:
                await until(lambda: (gate.trouble or "ok") == status)
                answer = await client.get("/health")
                assert answer.json()["status"] == status
                assert answer.status_code == (200 if status == "ok" else 503)

            await becomes("ok")
            replica.silent = True
            await becomes(f"silent: replica {replica.slot}")
            replica.silent = False
            await becomes("ok")
            second.step_age = 11.0
            await becomes(f"stalled: replica {second.slot}")
            second.step_age = 9.0
            await becomes("ok")
            await second.stop()
            await becomes(f"gone: replica {second.slot}")
            assert (await client.get("/ready")).status_code == 200, "the other one serves"

    asyncio.run(run())


def test_a_second_signal_does_not_wait_for_what_runs(
    service: Callable[[], Service], checkpoint: Callable[[str], Path]
) -> None:
    async def run() -> None:
        gate = service()
        engine = EngineConfig(model=str(checkpoint("llama")))
        server = Server(engine, ServeConfig(shutdown_timeout=86400), find_model(engine))
        async with http(gate) as (_, replica):
            replica.holds = lambda submit: True
            generation = gate.start([5, 6], SamplingParams())
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
            generation = gate.start([5, 6], SamplingParams(max_tokens=TOKENS))
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
            RoutingTable(1, (replica.entry(),)),
            KeyError("a bug"),
            RoutingTable(2, (), "the disk is gone"),
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
            service.dispatcher.update_table(RoutingTable(1, (replica.entry(),)))
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


def test_what_kills_replicas_before_its_start_ends_too(tokenizer: Tokenizer) -> None:
    """Nobody has said that it was in a step; what only waits beside it goes on, however many replicas are lost."""

    async def run() -> None:
        async with gateway(tokenizer, 2) as g:

            def kills(replica: FakeReplica) -> Callable[[pb.Submit], pb.Ending | None]:
                def look(submit: pb.Submit) -> None:
                    if submit.prompt[0] == 99:
                        replica.die("the engine failed")

                return look

            async def bring_back() -> None:
                while True:
                    await asyncio.sleep(0.1)
                    for replica in g.replicas:
                        replica.alive = True

            controller = asyncio.ensure_future(bring_back())
            for replica in g.replicas:
                replica.refuses = kills(replica)
            poison = g.start([99, 1])
            with pytest.raises(PoisonRequest):
                await tokens(poison)
            assert sum(replica.deaths for replica in g.replicas) <= 4
            controller.cancel()

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
        dispatcher.update_table(RoutingTable(1, (entry,)))
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
