"""The limits of a call in docs/limits.md, met: what is just within each finds no replica, which there is none of; what
is just beyond gets the answer that the page names."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import grpc
import httpx
import orjson
import pytest
from gateways import models_of
from grpc_health.v1 import health_pb2, health_pb2_grpc
from quire_cluster.gateway.call_errors import status_code
from quire_cluster.gateway.connection import Limits
from quire_cluster.gateway.doors import BodyCheck
from quire_cluster.gateway.grpc_api import GrpcServer, InferenceService
from quire_cluster.gateway.http import Api, error_response
from quire_cluster.gateway.service import Service
from quire_cluster.governance.identity import SharedKeys
from quire_cluster.keys import Keys
from quire_cluster.observability.metrics import Metrics
from quire_engine.config import DEMO_MODEL
from quire_engine.errors import PoisonRequest, QueueFull, QuireError, Unavailable
from quire_engine.pooling import Pooling
from quire_engine.text.tokenizer import Tokenizer
from quire_engine.weights.resolve import resolve
from quire_protos.v1 import inference_pb2 as pb
from quire_protos.v1 import inference_pb2_grpc
from starlette.types import ASGIApp

CONTEXT = 8192
LIMITS = Limits(connections=2, head=60.0, body=60.0, write=60.0)
CODE = grpc.StatusCode
Message = Any


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(resolve(DEMO_MODEL))


def service(tokenizer: Tokenizer, *, pooling: Pooling | None = None, context: int = CONTEXT) -> Service:
    """Without replicas, so that nothing is computed, and nothing waits for one."""
    return Service(
        resolve(DEMO_MODEL),
        tokenizer,
        names=["demo"],
        max_model_len=context,
        max_waiting=0,
        metrics=Metrics(),
        pooling=pooling,
    )


def post(app: ASGIApp, route: str, content: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
            return await client.post(route, content=content)

    return asyncio.run(run())


@contextlib.asynccontextmanager
async def grpc_server(served: Service, keys: Keys | None = None) -> AsyncIterator[int]:
    server = GrpcServer(models_of(served), LIMITS, identity=SharedKeys(keys) if keys else None)
    try:
        yield await server.start("127.0.0.1", 0)
    finally:
        await server.stop(0)


def channel(port: int) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.use_local_subchannel_pool", 1)])


async def outcome(call: Any) -> tuple[grpc.StatusCode, str]:
    try:
        [_ async for _ in call] if hasattr(call, "__aiter__") else await call
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    return CODE.OK, ""


def calls(served: Service, method: str, *messages: Message) -> list[tuple[grpc.StatusCode, str]]:
    async def run() -> list[tuple[grpc.StatusCode, str]]:
        async with grpc_server(served) as port, channel(port) as to:
            stub = inference_pb2_grpc.InferenceStub(to)
            return [await outcome(getattr(stub, method)(message)) for message in messages]

    return asyncio.run(run())


# ---- what is sampled ----------------------------------------------------------------------------------------------

SAMPLING: dict[str, list[tuple[str, Any, Any]]] = {  # of a row of the page: field, just within, just beyond
    "`n`": [("n", 128, 129), ("n", 1, 0)],
    "`stop`: texts, characters of one": [("stop", ["x"] * 64, ["x"] * 65), ("stop", ["x" * 1000], ["x" * 1001])],
    "`stop_token_ids`": [("stop_token_ids", [5] * 256, [5] * 257)],
    "`logit_bias`": [
        ("logit_bias", dict.fromkeys(range(1024), 1.0), dict.fromkeys(range(1025), 1.0)),
        ("logit_bias", {5: 100.0}, {5: 100.5}),
        ("logit_bias", {5: -100.0}, {5: -100.5}),
    ],
    "`bad_words`: texts, characters of one": [
        ("bad_words", ["x"] * 256, ["x"] * 257),
        ("bad_words", ["x" * 256], ["x" * 257]),
    ],
    "`logprobs`, `top_logprobs`, `prompt_logprobs`": [("logprobs", 20, 21), ("prompt_logprobs", 20, 21)],
    "prompt and `max_tokens`": [("max_tokens", CONTEXT - 2, CONTEXT - 1)],
    "`temperature`": [("temperature", 1000.0, 1000.5), ("temperature", 0.0, -0.5)],
    "`top_p`, `min_p`": [("top_p", 1.0, 1.5), ("top_p", 0.0, -0.5), ("min_p", 1.0, 1.5), ("min_p", 0.0, -0.5)],
    "`presence_penalty`, `frequency_penalty`": [
        (name, end, 1.25 * end) for name in ("presence_penalty", "frequency_penalty") for end in (-2.0, 2.0)
    ],
    "`repetition_penalty`": [("repetition_penalty", 100.0, 100.5), ("repetition_penalty", 0.015625, 0.0)],
    "`top_k`": [("top_k", -1, -2), ("top_k", 2**31 - 1, None)],
    "`allowed_token_ids`": [("allowed_token_ids", [0, 49151], [0, 49152]), ("allowed_token_ids", [5], None)],
}


def as_json(value: Any) -> Any:
    return {str(key): one for key, one in value.items()} if isinstance(value, dict) else value


@pytest.mark.parametrize("row", SAMPLING)
def test_what_is_sampled(row: str, tokenizer: Tokenizer) -> None:
    served = service(tokenizer)
    for name, within, beyond in SAMPLING[row]:
        bodies = [{"prompt": [5, 6], name: as_json(value)} for value in (within, beyond) if value is not None]
        answers = [post(Api(models_of(served)).app(), "/v1/completions", orjson.dumps(body)) for body in bodies]
        messages = [
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 6]), sampling=pb.SamplingParams(**{name: value}))
            for value in (within, beyond)
            if value is not None
        ]
        said = calls(served, "Generate", *messages)
        assert (answers[0].status_code, said[0][0]) == (503, CODE.UNAVAILABLE), (name, answers[0].text, said)
        for answer, (code, why) in zip(answers[1:], said[1:], strict=True):
            assert (answer.status_code, code) == (400, CODE.INVALID_ARGUMENT), (name, answer.text)
            assert answer.json()["error"]["param"] == name
            assert name in why


# ---- bodies -------------------------------------------------------------------------------------------------------

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MANY = (1 << 20) + 1
TURN = {"role": "user", "content": "x"}
BODIES: dict[str, list[tuple[str, Callable[[], Any], int, str]]] = {  # route, body, status, what is said
    "`prompt`, a message's or an input's text": [
        # more fits into a body only where the context is large
        (TEXT, lambda: {"prompt": "x" * ((1 << 24) + 1)}, 400, "at most 16777216 are read"),
        (CHAT, lambda: {"messages": [TURN | {"content": "x" * ((1 << 24) + 1)}]}, 413, "bytes"),
    ],
    "values in a body": [
        (TEXT, lambda: {"prompt": "x", "metadata": [0] * (1 << 20)}, 503, "no replica"),
        (TEXT, lambda: {"prompt": "x", "metadata": [0] * (MANY + 1024)}, 413, "values"),
        (TEXT, lambda: {"prompt": "x", "metadata": [[]] * (MANY // 5 + 1024)}, 413, "counts as four"),
    ],
    "messages of a conversation": [(CHAT, lambda: {"messages": [TURN] * 40_001}, 400, "from 1 to 40000 are read")],
    "token ids of a call, tokens that /tokenize gives": [
        (TEXT, lambda: {"prompt": [5] * MANY}, 400, "at most 1048576 are read"),
        ("/detokenize", lambda: {"tokens": [5] * MANY}, 400, "at most 1048576 are read"),
    ],
    "integers": [
        (TEXT, lambda: {"prompt": "x", "top_k": 2**31 - 1, "seed": 2**63 - 1, "priority": -(2**31)}, 503, "no replica"),
        (TEXT, lambda: {"prompt": "x", "top_k": 2**31}, 400, "top_k"),
        (TEXT, lambda: {"prompt": "x", "priority": -(2**31) - 1}, 400, "priority"),
        (TEXT, lambda: {"prompt": "x", "seed": 2**63}, 400, "seed"),
    ],
    "prompts of a call, answers of a call (prompts times `n`)": [
        (TEXT, lambda: {"prompt": ["x"] * 256, "n": 4}, 503, "no replica"),
        (TEXT, lambda: {"prompt": ["x"] * 257}, 400, "at most 256"),
        (TEXT, lambda: {"prompt": ["x"] * 256, "n": 5}, 400, "more than 1024 answers"),
    ],
    "`logprobs`, `top_logprobs`, `prompt_logprobs`": [
        (CHAT, lambda: {"messages": [TURN], "logprobs": True, "top_logprobs": 20}, 503, "no replica"),
        (CHAT, lambda: {"messages": [TURN], "logprobs": True, "top_logprobs": 21}, 400, "between 0 and 20"),
    ],
    "prompt and `max_tokens`": [
        (TEXT, lambda: {"prompt": [5] * (CONTEXT - 1), "max_tokens": 1}, 503, "no replica"),
        (TEXT, lambda: {"prompt": [5] * CONTEXT, "max_tokens": 1}, 400, "8192"),
    ],
    "`user`, `cache_salt`, `request_id`: characters": [
        (
            TEXT,
            lambda: {"prompt": "x", "user": "u" * 512, "cache_salt": "s" * 256, "request_id": "r" * 128},
            503,
            "no replica",
        ),
        (TEXT, lambda: {"prompt": "x", "user": "u" * 513}, 400, "512"),
        (TEXT, lambda: {"prompt": "x", "cache_salt": "s" * 257}, 400, "256"),
        (TEXT, lambda: {"prompt": "x", "request_id": "r" * 129}, 400, "128"),
    ],
    "`role` of a message, `reasoning_effort`, `verbosity`: characters": [
        (CHAT, lambda: {"messages": [TURN | {"role": "r" * 65}]}, 400, "no role"),
        (CHAT, lambda: {"messages": [TURN], "verbosity": "v" * 32}, 503, "no replica"),
        (CHAT, lambda: {"messages": [TURN], "verbosity": "v" * 33}, 400, "32"),
        (CHAT, lambda: {"messages": [TURN], "reasoning_effort": "v" * 33}, 400, "32"),
    ],
}


@pytest.mark.parametrize("row", BODIES)
def test_what_a_body_holds(row: str, tokenizer: Tokenizer) -> None:
    app = Api(models_of(service(tokenizer))).app()
    for route, body, status, words in BODIES[row]:
        answer = post(app, route, orjson.dumps(body()))
        assert answer.status_code == status, answer.text[:300]
        assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize(("context", "prompts"), [(CONTEXT, 1), (CONTEXT, 256), (1 << 24, 1)])
def test_how_long_a_body_is(context: int, prompts: int, tokenizer: Tokenizer) -> None:
    """What is allowed for prompts is six bytes for each character of the longest tokens."""
    served = service(tokenizer, context=context)
    longest = max(len(tokenizer.token_text(token)) for token in range(49152))
    most = min(32 << 20, (4 << 20) + 256 * context * longest * 6)
    route, extra = TEXT, {"prompt": "x"}
    if prompts == 1:  # other routes take one
        route, extra = CHAT, {"messages": [TURN]}
        most = min(32 << 20, (4 << 20) + context * longest * 6)
    start = orjson.dumps(extra)
    assert post(Api(models_of(served)).app(), route, start.ljust(most)).status_code == 503
    refused = post(Api(models_of(served)).app(), route, start.ljust(most + 1))
    assert refused.status_code == 413
    assert refused.headers["connection"] == "close"


def test_how_long_a_message_is(tokenizer: Tokenizer) -> None:
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5]), cache_salt="x" * (8 << 20))
    over = request.ByteSize() - (8 << 20)
    within = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5]), cache_salt="x" * ((8 << 20) - over))
    beyond = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5]), cache_salt="x" * ((8 << 20) - over + 1))
    assert (within.ByteSize(), beyond.ByteSize()) == (8 << 20, (8 << 20) + 1)
    said = calls(service(tokenizer), "Generate", within, beyond)
    assert [code for code, _ in said] == [CODE.UNAVAILABLE, CODE.RESOURCE_EXHAUSTED]


MESSAGES: dict[str, tuple[str, Callable[[], Message], str]] = {
    "messages": ("Chat", lambda: pb.ChatRequest(messages=[pb.ChatMessage(**TURN)] * 40_001), "from 1 to 40000"),
    "a prompt": (
        "Generate",
        lambda: pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * (CONTEXT + 1))),
        "at most 8192",
    ),
    "ids": ("Detokenize", lambda: pb.DetokenizeRequest(token_ids=[5] * MANY), "at most 1048576"),
    "resumed": (
        "Generate",
        lambda: pb.GenerateRequest(
            text="x",
            resume=[pb.Emitted(index=index, token_ids=[5] * 1024) for index in range(1025)],
        ),
        "at most 1048576",
    ),
    "entries": (
        "Generate",
        lambda: pb.GenerateRequest(text="x", sampling=pb.SamplingParams(allowed_token_ids=[5] * 100_001)),
        "100001 entries",
    ),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_what_a_message_holds(name: str, tokenizer: Tokenizer) -> None:
    method, message, words = MESSAGES[name]
    [(code, why)] = calls(service(tokenizer), method, message())
    assert code is CODE.INVALID_ARGUMENT, why
    assert words in why


def test_tokens_that_are_listed(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """2^20 of them take long, so here it is fewer."""
    monkeypatch.setattr("quire_cluster.gateway.texts.MAX_LISTED", 20_000)
    served = service(tokenizer)
    answers = [
        post(Api(models_of(served)).app(), "/tokenize", orjson.dumps({"prompt": " a" * count}))
        for count in (20_000, 20_001)
    ]
    assert [answer.status_code for answer in answers] == [200, 400]
    assert "at most 20000 are taken" in answers[1].json()["error"]["message"]
    said = calls(served, "Tokenize", *(pb.TokenizeRequest(text=" a" * count) for count in (20_000, 20_001)))
    assert [code for code, _ in said] == [CODE.OK, CODE.INVALID_ARGUMENT]


def test_texts_for_vectors(tokenizer: Tokenizer) -> None:
    served = service(tokenizer, pooling=Pooling(kind="mean"))
    for route, make in (
        ("/v1/embeddings", lambda count: {"input": ["x"] * count}),
        ("/v1/score", lambda count: {"text_1": "x", "text_2": ["y"] * count}),
        ("/v1/rerank", lambda count: {"query": "x", "documents": ["y"] * count}),
    ):
        within, beyond = (
            post(Api(models_of(served)).app(), route, orjson.dumps(make(count))) for count in (2048, 2049)
        )
        assert within.status_code == 503, within.text
        assert beyond.status_code == 400
        assert "from 1 to 2048" in beyond.json()["error"]["message"]
    messages = [pb.EmbedRequest(inputs=[pb.EmbedInput(text="x")] * count) for count in (2048, 2049)]
    assert [code for code, _ in calls(served, "Embed", *messages)] == [CODE.UNAVAILABLE, CODE.INVALID_ARGUMENT]


def test_vectors_of_one_answer(tokenizer: Tokenizer) -> None:
    """Before any is computed: there is no replica that could."""
    served = service(tokenizer, pooling=Pooling(kind="mean"))
    served.vector_size = 16384
    fit = (32 << 20) // (4 * 16384) - 1
    messages = [pb.EmbedRequest(inputs=[pb.EmbedInput(text="x")] * count) for count in (fit, fit + 1)]
    assert [code for code, _ in calls(served, "Embed", *messages)] == [CODE.UNAVAILABLE, CODE.INVALID_ARGUMENT]
    largest = pb.EmbedResponse(embeddings=[pb.Embedding(values=[1.0] * 16384)] * fit)
    assert largest.ByteSize() <= 32 << 20


# ---- load ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "header", "code"),
    [
        (QueueFull("full"), 429, ("retry-after", "1"), CODE.RESOURCE_EXHAUSTED),
        (Unavailable("none"), 503, ("retry-after", "1"), CODE.UNAVAILABLE),
        (PoisonRequest("poison"), 500, ("x-should-retry", "false"), CODE.INTERNAL),
    ],
)
def test_what_a_refusal_is_called(error: QuireError, status: int, header: tuple[str, str], code: Any) -> None:
    answer = error_response(error)
    assert (answer.status_code, answer.headers[header[0]]) == (status, header[1])
    assert status_code(error) is code


def test_a_server_at_its_end_takes_nothing_new(tokenizer: Tokenizer) -> None:
    served = service(tokenizer)
    served.draining = True
    answer = post(Api(models_of(served)).app(), TEXT, orjson.dumps({"prompt": "x"}))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert "shutting down" in answer.json()["error"]["message"]
    [(code, why)] = calls(served, "Generate", pb.GenerateRequest(text="x"))
    assert code is CODE.UNAVAILABLE
    assert "shutting down" in why


def test_bodies_that_are_too_many_together(tokenizer: Tokenizer) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b" " * 60
        yield b" " * 60
        yield b'{"prompt": "x"}'

    app = Api(models_of(service(tokenizer))).app()
    answer = post(BodyCheck(app, held=100), TEXT, body())
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert "too much is being sent" in answer.json()["error"]["message"]


# ---- connections of gRPC ------------------------------------------------------------------------------------------


def grpc_settings(port: int) -> dict[int, int]:
    """What an HTTP/2 server says of itself in its first frame."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as wire:
        wire.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)))
        got = b""
        while len(got) < 9 or len(got) < 9 + int.from_bytes(got[:3], "big"):
            more = wire.recv(1 << 16)
            assert more
            got += more
    assert got[3] == 4, "SETTINGS"
    return dict(struct.iter_unpack("!HI", got[9 : 9 + int.from_bytes(got[:3], "big")]))


def run_with_grpc(served: Service, work: Callable[[int], Coroutine[Any, Any, None]], keys: Keys | None = None) -> None:
    async def run() -> None:
        async with grpc_server(served, keys) as port, asyncio.timeout(120):
            await work(port)

    asyncio.run(run())


def test_calls_and_headers_of_one_connection(tokenizer: Tokenizer) -> None:
    async def work(port: int) -> None:
        found = await asyncio.to_thread(grpc_settings, port)
        assert found[3] == 1024, "SETTINGS_MAX_CONCURRENT_STREAMS"
        assert found[6] == 16 << 10, "SETTINGS_MAX_HEADER_LIST_SIZE"

    run_with_grpc(service(tokenizer), work)


def test_as_many_calls_as_connections(tokenizer: Tokenizer) -> None:
    """Watching the health service, which wants no key, is a call that goes on."""

    async def work(port: int) -> None:
        async with channel(port) as to:
            health = health_pb2_grpc.HealthStub(to)
            watching = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(LIMITS.connections)]
            for one in watching:
                assert (await one.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            code, _ = await outcome(inference_pb2_grpc.InferenceStub(to).ListModels(pb.ListModelsRequest()))
            assert code is CODE.RESOURCE_EXHAUSTED
            watching.pop().cancel()
            while code is CODE.RESOURCE_EXHAUSTED:
                code, _ = await outcome(inference_pb2_grpc.InferenceStub(to).ListModels(pb.ListModelsRequest()))
            assert code is CODE.UNAUTHENTICATED
            watching.pop().cancel()

    run_with_grpc(service(tokenizer), work, Keys(["key"]))


def test_more_connections_are_not_accepted(tokenizer: Tokenizer) -> None:
    async def work(port: int) -> None:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(LIMITS.connections):
                to = await stack.enter_async_context(channel(port))
                assert (await outcome(inference_pb2_grpc.InferenceStub(to).ListModels(pb.ListModelsRequest())))[
                    0
                ] is CODE.OK
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            assert await reader.read() == b"", "it is hung up on, unanswered"
            writer.close()

    run_with_grpc(service(tokenizer), work)


class Ended:
    """A call that is over for its client, as gRPC's contexts are then."""

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        raise grpc.aio.InternalError


def test_who_has_left_is_refused_nothing(tokenizer: Tokenizer) -> None:
    """The call ends as gRPC ends those that run when their client leaves: it is no failure of ours."""
    methods = InferenceService(models_of(service(tokenizer)), 60.0)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(methods.Tokenize(pb.TokenizeRequest(text="a", model="another"), Ended()))
