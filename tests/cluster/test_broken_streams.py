"""A stream that broke with its gateway goes on at another one, from what the client holds."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from fake_replica import FakeReplica
from gateways import expected, models_of, until
from quire import AsyncClient, Client
from quire_cluster.gateway.connection import Limits
from quire_cluster.gateway.generation import Choice, RequestFacts
from quire_cluster.gateway.grpc_api import GrpcServer
from quire_cluster.gateway.service import Service
from quire_cluster.routing_table import RoutingTable
from quire_engine.config import DEMO_MODEL
from quire_engine.errors import InvalidParameter
from quire_engine.request import EngineSampling
from quire_engine.text.output import OutputText
from quire_engine.text.params import SamplingParams
from quire_engine.text.tokenizer import Tokenizer
from quire_engine.weights.resolve import resolve
from quire_protos.v1 import inference_pb2 as pb
from quire_protos.v1 import inference_pb2_grpc

LIMITS = Limits(connections=64, head=60.0, body=60.0, write=60.0)
TEXT = "Ünïcödé 🙂🙂 and «quotes»: one STOP, two STOPS, 三 STOPPED. The end."


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return Tokenizer.load(resolve(DEMO_MODEL))


def choice(tokenizer: Tokenizer, params: SamplingParams, ends: tuple[int, ...]) -> Choice:
    facts = RequestFacts("request", [5], 0, 0.0, b"", 0.0)
    sampling = EngineSampling(max_tokens=100, min_tokens=params.min_tokens, stop_token_ids=ends)
    return Choice(0, facts, sampling, OutputText(tokenizer, params, [5]), asyncio.Event())


def pieces(one: Choice, tokens: list[int]) -> tuple[list[str], str | None, str | int | None]:
    """What each token shows, and the ending; the last piece is what the ending shows."""
    shown = []
    for token in tokens:
        one.accept(len(one.output), token, 0.0)
        if one.ended:
            break
        delta = one.take()
        shown.append(delta.text if delta else "")
    one.end("length")
    last = one.take()
    assert last is not None
    return [*shown, last.text], last.finish_reason, last.stop_reason


@pytest.mark.parametrize("params", [{}, {"stop": ["STOP"]}, {"stop": ["STOPPED", "one STOP, two!"], "min_tokens": 9}])
@pytest.mark.parametrize("include", [False, True])
def test_a_text_goes_on_after_any_of_its_tokens(demo: Tokenizer, params: dict[str, Any], include: bool) -> None:
    """With the same pieces, however much was held back: characters of several tokens, beginnings of stop texts."""
    asked = SamplingParams(**params, include_stop_str_in_output=include)
    [tokens] = demo.encode_all([TEXT], add_special_tokens=False)
    whole, *ending = pieces(choice(demo, asked, ()), tokens)
    for held in range(len(whole)):
        one = choice(demo, asked, ())
        one.resume(tokens[:held], finished=False)
        rest, *then = pieces(one, tokens[held:])
        assert (rest, then) == (whole[held:], ending)
        assert one.output == tokens[: len(one.output)]


def test_what_has_ended_is_not_gone_on_with(demo: Tokenizer) -> None:
    [tokens] = demo.encode_all(["One two three"], add_special_tokens=False)
    stopped = choice(demo, SamplingParams(), (tokens[-1],))
    stopped.resume(tokens, finished=False)
    delta = stopped.take()
    assert delta is not None
    assert (delta.finish_reason, delta.stop_reason, delta.token_ids) == ("stop", tokens[-1], [])
    known = choice(demo, SamplingParams(), (tokens[-1],))
    known.resume(tokens, finished=True)
    assert known.ended and known.take() is None
    with pytest.raises(InvalidParameter, match="after its end"):
        choice(demo, SamplingParams(), (tokens[0],)).resume(tokens, finished=False)
    with pytest.raises(InvalidParameter, match="after its end"):
        choice(demo, SamplingParams(stop="two"), ()).resume(tokens, finished=False)
    with pytest.raises(InvalidParameter, match=r"more tokens .* than max_tokens"):
        choice(demo, SamplingParams(), ()).resume([5] * 101, finished=False)
    full = choice(demo, SamplingParams(), ())
    full.resume([5] * 100, finished=False)
    assert full.finish_reason == "length"


class Gate:
    """A gateway over a replica of its own, on a port that stays."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.replica = FakeReplica()
        self.address = ""
        self._server = GrpcServer(models_of(service), LIMITS, identity=None)

    async def start(self) -> "Gate":
        await self.replica.start()
        self.service.dispatcher.update_table(RoutingTable((self.replica.entry(),)))
        await until(lambda: self.service.ready)
        self.address = f"127.0.0.1:{await self._server.start('127.0.0.1', 0)}"
        return self

    async def die(self) -> None:
        await self._server.stop(0)

    async def stop(self) -> None:
        await self.die()
        await self.service.dispatcher.close()
        await self.replica.stop()


@asynccontextmanager
async def gates(service: Callable[[], Service], count: int = 2) -> AsyncIterator[list[Gate]]:
    found = [await Gate(service()).start() for _ in range(count)]
    try:
        async with asyncio.timeout(300):
            yield found
    finally:
        for gate in found:
            await gate.stop()


@pytest.mark.parametrize(("number", "count"), [(1, 6), (4, 2)])
def test_streams_go_on_elsewhere(service: Callable[[], Service], number: int, count: int) -> None:
    """Each of `number` answers of a call, several calls at once, from wherever each was."""

    async def run() -> None:
        async with gates(service) as both:
            broken = asyncio.Event()
            for gate in both:  # each answers up to a token of its own, until one of them has died
                gate.replica.holds = lambda submit: not broken.is_set()
            async with AsyncClient([gate.address for gate in both]) as client:
                calls = [
                    asyncio.ensure_future(client.generate([5 + call, 17, 30], max_tokens=30, n=number))
                    for call in range(count)
                ]
                await until(lambda: all(len(gate.replica.submitted) == count // 2 * number for gate in both))
                await both[0].die()
                broken.set()
                for gate in both:
                    gate.replica.die()
                    gate.replica.alive = True
                for call, answer in enumerate(await asyncio.gather(*calls)):
                    assert [output.token_ids for output in answer.outputs] == [expected([5 + call, 17, 30])] * number
                    assert answer.completion_tokens == 30 * number

    asyncio.run(run())


def test_the_seed_is_sent_from_the_start(service: Callable[[], Service]) -> None:
    """And is the same in every attempt; the caller's, if there is one."""

    async def run() -> None:
        async with gates(service, 1) as [gate]:
            async with AsyncClient(gate.address) as client:
                for seed in (None, 7):
                    options = {} if seed is None else {"seed": seed}
                    await client.generate([5, 6], max_tokens=2, **options)
            seeds = [submit.sampling.seed for submit in gate.replica.submitted]
            async with AsyncClient(gate.address) as client:
                await client.generate([5, 6], max_tokens=2, seed=7)
            assert gate.replica.submitted[-1].sampling.seed == seeds[1] != seeds[0]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("resume", "options", "why"),
    [
        ([pb.Emitted(token_ids=[5])], {"temperature": 1.0}, "wants the seed"),
        ([pb.Emitted(token_ids=[5]), pb.Emitted(token_ids=[5])], {"seed": 1}, "answer 0 twice"),
        ([pb.Emitted(index=1, token_ids=[5])], {"seed": 1}, "an answer 1, and n is 1"),
        ([pb.Emitted(token_ids=[1 << 30])], {"seed": 1}, "outside 0 to"),
        ([pb.Emitted(token_ids=[5] * 31)], {"seed": 1}, "more tokens"),
        ([pb.Emitted(token_ids=[5] * 100_000)], {"seed": 1}, "at most 4096 fit"),
    ],
)
def test_what_cannot_be_gone_on_with(
    service: Callable[[], Service], resume: list[pb.Emitted], options: dict[str, Any], why: str
) -> None:
    async def run() -> None:
        async with gates(service, 1) as [gate], grpc.aio.insecure_channel(gate.address) as channel:
            stub: Any = inference_pb2_grpc.InferenceStub(channel)
            request = pb.GenerateRequest(
                token_ids=pb.TokenIds(ids=[5]), sampling=pb.SamplingParams(max_tokens=30, **options), resume=resume
            )
            with pytest.raises(grpc.RpcError) as refused:
                async for _ in stub.Generate(request):
                    pass
            call: Any = refused.value
            assert call.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert why in call.details()

    asyncio.run(run())


def test_who_resumes_waits_like_anyone(service: Callable[[], Service]) -> None:
    """No replica has admitted it: its queue may be too full."""

    async def run() -> None:
        async with gates(service, 1) as [gate], grpc.aio.insecure_channel(gate.address) as channel:
            stub: Any = inference_pb2_grpc.InferenceStub(channel)
            request = pb.GenerateRequest(
                token_ids=pb.TokenIds(ids=[5]),
                sampling=pb.SamplingParams(max_tokens=30, seed=1),
                resume=[pb.Emitted(token_ids=[7])],
            )
            async for _ in stub.Generate(request):
                pass
            [submit] = gate.replica.submitted
            assert not submit.resumed
            assert list(submit.output) == [7]

    asyncio.run(run())


def test_calls_take_turns_and_leave_out_who_is_gone(service: Callable[[], Service]) -> None:
    async def run() -> None:
        async with gates(service, 3) as all_three:
            addresses = ",".join(gate.address for gate in all_three)

            def ask() -> list[str]:
                with Client(addresses) as client:
                    return [
                        client.generate([5 + call, 6], max_tokens=1).outputs[0].finish_reason or "" for call in range(6)
                    ]

            assert await asyncio.to_thread(ask) == ["length"] * 6
            assert [len(gate.replica.submitted) for gate in all_three] == [2, 2, 2]
            await all_three[1].die()
            assert await asyncio.to_thread(ask) == ["length"] * 6
            assert [len(gate.replica.submitted) for gate in all_three][1] == 2
            for gate in all_three:
                await gate.die()
            with pytest.raises(grpc.RpcError) as refused:
                await asyncio.to_thread(ask)
            call: Any = refused.value
            assert call.code() is grpc.StatusCode.UNAVAILABLE

    asyncio.run(run())
