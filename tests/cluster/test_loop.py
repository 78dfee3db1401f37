"""The gateway's event loop goes on while it works on what a caller sends, however large."""

import asyncio
import gc
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import grpc
import httpx
import orjson
import pytest
from gateways import http, models_of
from hypothesis import given
from hypothesis import strategies as st
from quire_cluster.gateway import bodies, grpc_api
from quire_cluster.gateway.connection import Limits
from quire_cluster.gateway.encoding import in_pieces
from quire_cluster.gateway.grpc_api import GrpcServer
from quire_cluster.gateway.http import Api
from quire_cluster.gateway.service import Service
from quire_cluster.observability.metrics import Metrics
from quire_engine.config import DEMO_MODEL
from quire_engine.errors import ContextTooLong
from quire_engine.pooling import Pooling
from quire_engine.text.tokenizer import Tokenizer
from quire_engine.weights.resolve import resolve
from quire_protos.v1 import inference_pb2 as pb
from quire_protos.v1 import inference_pb2_grpc

LIMITS = Limits(connections=16, head=60.0, body=60.0, write=60.0)
_LONGEST_GAP, _TRIES = 0.1, 5  # seconds
WORDS = "the quick brown fox jumps over the lazy dog and runs away "


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(resolve(DEMO_MODEL))


@pytest.fixture
def frozen() -> Iterator[None]:
    """As in a server: a collection does not go through what was there before."""
    gc.freeze()
    yield
    gc.unfreeze()


def service(tokenizer: Tokenizer, pooling: Pooling | None = None) -> Service:
    """Without replicas: what is sent here is refused, or needs none."""
    files = resolve(DEMO_MODEL)
    return Service(
        files, tokenizer, names=["demo"], max_model_len=8192, max_waiting=0, metrics=Metrics(), pooling=pooling
    )


def text(size: int) -> str:
    return WORDS * (size // len(WORDS))


def parts(kind: str, count: int) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": kind, "text": "hello"}] * count}]


TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
BAD_WORDS = [(f"ab{i}" * 64)[:256] for i in range(256)]
TURNS = [{"role": "user", "content": "hello"}]
SENT: dict[str, tuple[str, Callable[[], Any], int]] = {
    "floats for a prompt": (TEXT, lambda: {"prompt": [0.5] * 1_000_000}, 400),
    "floats for stop": (TEXT, lambda: {"prompt": "x", "stop": [0.5] * 1_000_000}, 400),
    "token ids": (TEXT, lambda: {"prompt": [5] * 1_000_000}, 400),
    "prompts": (TEXT, lambda: {"prompt": [text(20_000)] * 128, "max_tokens": 9000}, 400),
    "a long prompt": (TEXT, lambda: {"prompt": text(30 << 20)}, 400),
    "objects": (TEXT, lambda: {"prompt": [{}] * 8_000_000}, 413),
    "unknown names": (TEXT, lambda: {f"a{i}": 1 for i in range(110_000)}, 400),
    "more names": (TEXT, lambda: {f"a{i}": 1 for i in range(200_000)}, 413),
    "turns": (CHAT, lambda: {"messages": [{"role": "user", "content": "hello"}] * 40_000}, 400),
    "parts": (CHAT, lambda: {"messages": parts("text", 40_000)}, 400),
    "wrong parts": (CHAT, lambda: {"messages": parts("image_url", 40_000)}, 400),
    "tokenize": ("/tokenize", lambda: {"prompt": text(2 << 20)}, 200),
    "tokenize 8 MB": ("/tokenize", lambda: {"prompt": text(8 << 20)}, 413),
    "detokenize": ("/detokenize", lambda: {"tokens": [1000] * 900_000}, 200),
    "detokenize 4 M": ("/detokenize", lambda: {"tokens": [1000] * 4_000_000}, 413),
    "texts to embed": ("/v1/embeddings", lambda: {"input": [text(5000)] * 500}, 400),
    "texts to rank": ("/rerank", lambda: {"query": "x", "documents": [text(5000)] * 500}, 400),
}


async def longest_gap(work: Awaitable[Any]) -> tuple[float, Any]:
    """The most that this process computed while its loop stood, in seconds of CPU time, and what came of the work. On a
    busy machine the loop stands for longer, but not because of what it works on."""
    last, longest = time.process_time(), 0.0
    task = asyncio.ensure_future(work)
    while not task.done():
        await asyncio.sleep(0.002)
        now = time.process_time()
        longest, last = max(longest, now - last), now
    return longest, await task


def undisturbed(run: Callable[[], tuple[float, Any]]) -> Any:
    """What comes of the first run in which the loop never stood for long. What the system does to it passes; what the
    work does to it comes in each."""
    gaps = []
    for _ in range(_TRIES):
        longest, answer = run()
        if longest < _LONGEST_GAP:
            return answer
        gaps.append(longest)
    raise AssertionError(f"the loop stood for {', '.join(f'{gap:.2f}' for gap in gaps)} s")


def compute() -> None:
    until = time.process_time() + 2 * _LONGEST_GAP
    while time.process_time() < until:
        pass


@pytest.mark.parametrize("blocks", [True, False])
def test_what_holds_the_loop_up_is_seen(blocks: bool) -> None:
    """And not what another thread does beside it."""

    async def work() -> None:
        compute() if blocks else await asyncio.to_thread(compute)

    if blocks:
        with pytest.raises(AssertionError, match="the loop stood for"):
            undisturbed(lambda: asyncio.run(longest_gap(work())))
    else:
        undisturbed(lambda: asyncio.run(longest_gap(work())))


@pytest.mark.parametrize("name", SENT)
def test_over_http(name: str, tokenizer: Tokenizer, frozen: None) -> None:
    route, content, status = SENT[name]
    body = orjson.dumps(content())

    async def run() -> tuple[float, httpx.Response]:
        transport = httpx.ASGITransport(Api(models_of(service(tokenizer))).app())
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            return await longest_gap(client.post(route, content=body))

    answer = undisturbed(lambda: asyncio.run(run()))
    assert answer.status_code == status, answer.text[:300]


MANY = {"prompt": ["x"] * 256, "max_tokens": 1}


@pytest.mark.parametrize(
    "asked",
    [
        {"bad_words": BAD_WORDS},
        {"n": 4, "allowed_token_ids": list(range(49152)), "stop": [f"{i}" * 200 for i in range(64)]},
    ],
)
def test_many_prompts_of_one_call(asked: dict[str, Any], tokenizer: Tokenizer, frozen: None) -> None:
    async def run() -> tuple[float, httpx.Response]:
        async with http(service(tokenizer), most_requests=2000) as (client, _):
            return await longest_gap(client.post(TEXT, json=MANY | asked))

    answer = undisturbed(lambda: asyncio.run(run()))
    assert answer.status_code == 200, answer.text[:300]
    assert len(answer.json()["choices"]) == 256 * asked.get("n", 1)


CALLS: dict[str, tuple[str, Callable[[], Any]]] = {
    "Tokenize": ("Tokenize", lambda: pb.TokenizeRequest(text=text(2 << 20))),
    "Detokenize": ("Detokenize", lambda: pb.DetokenizeRequest(token_ids=[1000] * 900_000)),
    "token ids": ("Generate", lambda: pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1000] * 3_000_000))),
    "a long prompt": ("Generate", lambda: pb.GenerateRequest(text=text(7 << 20))),
    "turns": ("Chat", lambda: pb.ChatRequest(messages=[pb.ChatMessage(role="user", content="hello")] * 40_000)),
    "nothing to embed": ("Embed", lambda: pb.EmbedRequest(inputs=[pb.EmbedInput()] * 2_000_000)),
    "texts to embed": ("Embed", lambda: pb.EmbedRequest(inputs=[pb.EmbedInput(text=text(5000))] * 500)),
}


@pytest.mark.parametrize("name", CALLS)
def test_over_grpc(name: str, tokenizer: Tokenizer, frozen: None) -> None:
    method, make = CALLS[name]
    request = make()

    async def run() -> tuple[float, Any]:
        server = GrpcServer(models_of(service(tokenizer)), LIMITS, identity=None)
        port = await server.start("127.0.0.1", 0)
        options = [("grpc.max_receive_message_length", 64 << 20)]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
            call = getattr(inference_pb2_grpc.InferenceStub(channel), method)

            async def ended() -> Any:
                try:
                    answer = call(request)
                    return [one async for one in answer] if hasattr(answer, "__aiter__") else await answer
                except grpc.aio.AioRpcError as error:
                    return error.code()

            found = await longest_gap(ended())
        await server.stop(0)
        return found

    answer = undisturbed(lambda: asyncio.run(run()))
    if name not in ("Tokenize", "Detokenize"):
        assert answer is grpc.StatusCode.INVALID_ARGUMENT, answer


@given(st.binary(max_size=40).map(lambda noise: bytes(b'"\\,{[a'[byte % 6] for byte in noise)), st.integers(1, 5))
def test_values_are_counted_outside_of_texts(data: bytes, piece: int) -> None:
    """Character by character."""
    expected, inside, escaped = 0, False, False
    for byte in data:
        if inside:
            inside, escaped = escaped or byte != ord('"'), byte == ord("\\") and not escaped
        elif byte == ord('"'):
            inside = True
        else:
            expected += {ord(","): 1, ord("{"): 4, ord("["): 4}.get(byte, 0)
    with pytest.MonkeyPatch().context() as patched:
        patched.setattr(bodies, "_PIECE", piece)
        if piece > 1 or b"\\" not in data:  # an escape takes two
            assert bodies._weight_outside_texts(data) == expected


LONG_TEXT = text(20_000)
# What works on a call's content, the call, and what it is answered. None of these takes long: a slow machine would not
# show where it is done.
WATCHED: dict[str, tuple[Any, str, str, dict[str, Any], int]] = {
    "a body": (bodies, "parse", TEXT, {"prompt": [5.5] * 10_000}, 400),
    "a prompt": (Tokenizer, "encode_all", TEXT, {"prompt": LONG_TEXT, "max_tokens": 9000}, 400),
    "a conversation": (Tokenizer, "render", CHAT, {"messages": TURNS * 40, "max_tokens": 9000}, 400),
    "a text": (Tokenizer, "encode_all", "/tokenize", {"prompt": LONG_TEXT}, 200),
    "spellings": (Tokenizer, "token_text", "/tokenize", {"prompt": LONG_TEXT, "return_token_strs": True}, 200),
    "tokens": (Tokenizer, "decode", "/detokenize", {"tokens": [1000] * 10_000}, 200),
    "bad words": (Tokenizer, "spellings", TEXT, {"prompt": "x", "bad_words": BAD_WORDS}, 503),
    "pairs": (Tokenizer, "encode_pairs", "/rerank", {"query": "x", "documents": [LONG_TEXT] * 9}, 503),
    "texts": (Tokenizer, "encode_all", "/v1/embeddings", {"input": [LONG_TEXT] * 9}, 400),
}


def watch(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> set[threading.Thread]:
    """The threads that a function is called in from now on."""
    plain, seen = getattr(owner, name), set[threading.Thread]()

    def watched(*arguments: Any, **named: Any) -> Any:
        seen.add(threading.current_thread())
        return plain(*arguments, **named)

    monkeypatch.setattr(owner, name, watched)
    return seen


@pytest.mark.parametrize("name", WATCHED)
def test_what_is_large_is_worked_on_in_threads(
    name: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, function, route, content, status = WATCHED[name]
    pooling = Pooling(kind="cls", normalize=False, scores=True, separator=2) if name == "pairs" else None

    async def run() -> httpx.Response:
        gate = service(tokenizer, pooling)
        seen = watch(monkeypatch, owner, function)
        transport = httpx.ASGITransport(Api(models_of(gate)).app())
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            answer = await client.post(route, json=content)
        assert seen
        assert threading.current_thread() not in seen
        return answer

    answer = asyncio.run(run())
    assert answer.status_code == status, answer.text[:300]


def test_messages_of_grpc_are_read_in_threads(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    class Context:
        @staticmethod
        def time_remaining() -> None:
            return None

        @staticmethod
        async def abort(code: grpc.StatusCode, why: str) -> None:
            assert code is grpc.StatusCode.INVALID_ARGUMENT, why
            raise grpc.aio.AbortError

    async def run() -> None:
        seen = watch(monkeypatch, grpc_api, "conversation")
        messages = [pb.ChatMessage(role="user", content="hello")] * 1000
        request = pb.ChatRequest(messages=messages, sampling=pb.SamplingParams(max_tokens=9000))
        with pytest.raises(grpc.aio.AbortError):
            await grpc_api.InferenceService(models_of(service(tokenizer)), 1.0).Chat(request, Context())
        assert seen
        assert threading.current_thread() not in seen

    asyncio.run(run())


def test_of_a_text_far_too_long_the_beginning_alone_is_tokenized(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = 0
    plain = Tokenizer.encode_all

    def counting(self: Tokenizer, texts: Sequence[str], **options: Any) -> list[list[int]]:
        nonlocal read
        read += sum(map(len, texts))
        return plain(self, texts, **options)

    monkeypatch.setattr(Tokenizer, "encode_all", counting)
    gate = service(tokenizer)
    for size in (400_000, 30 << 20):
        with pytest.raises(ContextTooLong, match="more tokens than the context of 8192 holds"):
            asyncio.run(gate.tokenize(text(size)))
    assert read < 200_000


def test_long_lists_are_encoded_as_they_would_be_at_once() -> None:
    content = {"a": [{"x": i} for i in range(1000)], "b": {"c": list(range(700)), "d": [1, 2]}, "e": [], "f": "g"}
    assert orjson.dumps(in_pieces(content)) == orjson.dumps(content)
