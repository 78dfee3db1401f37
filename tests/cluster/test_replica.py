"""A replica's end of its sessions, over an executor that needs no model."""

import asyncio
import functools
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import Any

import grpc
import numpy as np
import pytest
from quire_cluster.convert import BATCH_BYTES, KEEPALIVE
from quire_cluster.keys import bearer
from quire_cluster.replica import EngineService, EngineThread, GatewaySession, session_server
from quire_engine.config import SchedulerLimits
from quire_engine.errors import InvalidParameter
from quire_engine.step import StepPlan, StepResult, TokenLogprobs
from quire_protos.v1 import engine_pb2 as pb
from quire_protos.v1 import engine_pb2_grpc

PROMPT = 30_000
WIDTH = 20


class Executor:
    """Draws token 5, and scores each prompt with its positions."""

    failure = None
    limits = SchedulerLimits(
        vocab_size=300,
        num_pages=3000,
        block_size=16,
        max_model_len=PROMPT + 100,
        max_num_seqs=4,
        max_num_batched_tokens=PROMPT,
        max_num_queued_reqs=8,
    )

    def __init__(self) -> None:
        self._plans: deque[StepPlan] = deque()

    def submit(self, plan: StepPlan) -> None:
        self._plans.append(plan)

    def collect(self) -> StepResult:
        plan = self._plans.popleft()
        scores = {}
        for row, start, count in zip(plan.rows.tolist(), plan.starts.tolist(), plan.counts.tolist(), strict=True):
            places = np.arange(start, start + count - 1, dtype=np.int32)
            top = np.repeat(places[:, None], WIDTH, 1)
            if count > 1:
                scores[row] = TokenLogprobs(places, places.astype(np.float32), places, top, top.astype(np.float32))
        return StepResult(np.full(int(plan.draws.sum()), 5, np.int32), prompt_logprobs=scores)


def test_scores_of_a_long_prompt_come_in_messages_of_bounded_size() -> None:
    """All of them, in order, and before the end."""

    async def run() -> list[pb.SessionUpdate]:
        workers: Any = Executor()
        engine = EngineThread(workers, asyncio.get_running_loop(), lambda error: None)
        engine.start()
        session = GatewaySession()
        sampling = pb.EngineSampling(max_tokens=1, temperature=1, top_p=1, repetition_penalty=1, prompt_logprobs=WIDTH)
        message = pb.Submit(id=7, prompt=[5] * PROMPT, sampling=sampling)
        engine.put(lambda: engine.submit(session, message, time.monotonic()))
        got: list[pb.SessionUpdate] = []
        async with asyncio.timeout(60):
            while not (got and got[-1].endings):
                update = await session.updates.get()
                assert update is not None
                got.append(update)
        engine.stop()
        return got

    got = asyncio.run(run())
    assert got[-1].endings[0].reason == "length", got[-1].endings
    assert max(update.ByteSize() for update in got) < BATCH_BYTES
    scores = [part for update in got for part in update.logprobs]
    assert [part.first for part in scores] == np.cumsum([0, *(len(part.chosen) for part in scores[:-1])]).tolist()
    assert [token for part in scores for token in part.chosen] == list(range(PROMPT - 1))


class Compiling(Executor):
    """Its grammars are compiled when, and as, the test says."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: dict[str, Future[None]] = {}

    def prepare(self, guidance: str) -> "Future[None]":
        return self.asked.setdefault(guidance, Future())


def test_a_request_is_admitted_once_its_grammar_is_compiled() -> None:
    """Else what only its worker finds would come when its caller has been told that all is well."""

    async def run() -> None:
        workers: Any = Compiling()
        engine = EngineThread(workers, asyncio.get_running_loop(), lambda error: None)
        engine.start()
        session = GatewaySession()
        asked = {1: "wrong", 2: "", 3: "right", 4: "", 5: "never"}
        for wire_id, guidance in asked.items():
            sampling = pb.EngineSampling(temperature=1, top_p=1, repetition_penalty=1, max_tokens=2, guidance=guidance)
            message = pb.Submit(id=wire_id, prompt=[5], sampling=sampling)
            engine.put(functools.partial(engine.submit, session, message, time.monotonic()))
        told: list[tuple[str, int]] = []

        async def until(*news: tuple[str, int]) -> None:
            async with asyncio.timeout(240):
                while not set(news) <= set(told):
                    update = await session.updates.get()
                    assert update is not None
                    told.extend(("admitted", wire_id) for wire_id in update.admitted)
                    told.extend(("token", wire_id) for wire_id in update.ids)
                    told.extend((ending.error_kind or ending.reason, ending.id) for ending in update.endings)

        await until(("length", 2), ("length", 4))
        assert told.index(("admitted", 2)) < told.index(("token", 2))
        workers.asked["wrong"].set_exception(InvalidParameter("no", "structured_outputs"))
        await until(("InvalidParameter", 1))
        workers.asked["right"].set_result(None)
        await until(("length", 3))
        assert told.index(("admitted", 3)) < told.index(("token", 3))
        engine.put(lambda: engine.abort(session, 5))
        await until(("abort", 5))
        assert [wire_id for what, wire_id in told if what == "admitted"] == [2, 4, 3]
        engine.stop()

    asyncio.run(run())


class Wire:
    """Between two ends of a connection. Once `cut`, nothing comes through, and nobody is told."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.cut = False

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind, to = await asyncio.open_connection("127.0.0.1", self._port)
        await asyncio.gather(self._carry(reader, to), self._carry(behind, writer))

    async def _carry(self, source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
        while data := await source.read(1 << 16):
            if not self.cut:
                to.write(data)
        to.close()


class Idle:
    """What the service asks of an engine's thread: the end of a session is the only action here."""

    def __init__(self) -> None:
        self.ended = 0

    def load(self) -> pb.Load:
        return pb.Load(most_requests=8)

    def put(self, action: Callable[[], None]) -> None:
        self.ended += 1


async def silence() -> AsyncIterator[pb.SessionRequest]:
    await asyncio.Event().wait()
    yield pb.SessionRequest()


def test_a_gateway_may_ask_whether_a_silent_replica_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Again and again: the replica does not hang up on it for that."""
    monkeypatch.setattr("quire_cluster.replica._HEARTBEAT", 1e6)
    often = [(name, 1100 if name == "grpc.keepalive_time_ms" else value) for name, value in KEEPALIVE]

    async def run() -> None:
        engine: Any = Idle()
        server = session_server(EngineService(engine), "secret")
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=often) as channel:
            stub: Any = engine_pb2_grpc.EngineStub(channel)
            call = stub.Session(silence(), metadata=bearer("secret"))
            assert (await call.read()).load.most_requests == 8
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(6):  # five pings
                    await call.read()
        await server.stop(0)

    asyncio.run(run())


def test_a_gateway_that_vanishes_without_a_word_leaves_no_work() -> None:
    """Its host lost the network, say: the connection is never reset."""

    async def run() -> None:
        engine: Any = Idle()
        server = session_server(EngineService(engine), "secret")
        wire = Wire(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        between = await asyncio.start_server(wire, "127.0.0.1", 0)
        address = "{}:{}".format(*between.sockets[0].getsockname())
        async with grpc.aio.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
            stub: Any = engine_pb2_grpc.EngineStub(channel)
            call = stub.Session(silence(), metadata=bearer("secret"))
            assert (await call.read()).load.most_requests == 8
            wire.cut = True
            async with asyncio.timeout(120):
                while not engine.ended:
                    await asyncio.sleep(0.05)
            call.cancel()
        between.close()
        await server.stop(0)

    asyncio.run(run())
