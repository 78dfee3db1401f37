"""Whatever a client sends, over HTTP or gRPC, is answered by it or refused: nothing fails, nothing hangs, no process is
replaced, and a stream beside it has the same tokens as alone."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest
from conftest import RunningServer, processes
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from quire_cluster.gateway import schema
from quire_protos.v1 import inference_pb2 as pb
from quire_protos.v1 import inference_pb2_grpc
from web import http

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
CHAT = {"messages": [{"role": "user", "content": "w5 w6"}], "max_tokens": 4}
ROUTES: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
    "/v1/completions": (schema.CompletionRequest, {"prompt": "w5 w6", "max_tokens": 4}),
    "/v1/chat/completions": (schema.ChatCompletionRequest, CHAT),
    "/v1/embeddings": (schema.EmbeddingRequest, {"input": "w5"}),
    "/v1/score": (schema.ScoreRequest, {"text_1": "w5", "text_2": "w6"}),
    "/v1/rerank": (schema.RerankRequest, {"query": "w5", "documents": ["w6"]}),
    "/tokenize": (schema.TokenizeRequest, {"prompt": "w5"}),
    "/detokenize": (schema.DetokenizeRequest, {"tokens": [5]}),
}
WORDS = st.sampled_from(["", "w5", "w5 w6", "w7w8", "é\u0301", "\ud83d", "\x00", "</s>", "{{ 1 }}", "user", "text"])
NUMBERS = (
    st.integers(-3, 400)
    | st.sampled_from([2**31 - 1, 2**31, -(2**31) - 1, 2**32, 2**63, -(2**63) - 1, 2**64, 10**30])
    | st.floats(-3, 3)
    | st.sampled_from([float("nan"), float("inf"), 1e-300, 1e300, -0.0])
)
SCALARS = st.none() | st.booleans() | NUMBERS | WORDS
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(WORDS | st.integers(0, 300).map(str), inner, max_size=3)
    ),
    max_leaves=8,
)


@st.composite
def bodies(draw: st.DrawFn, route: str) -> bytes:
    """A valid body in which a few fields, of the schema or not, have other values; now and then cut or not JSON."""
    kind, base = ROUTES[route]
    names = st.sampled_from([*kind.model_fields, "frobnicate"])
    changes = draw(st.dictionaries(names, ANYTHING | st.lists(st.integers(0, 310), max_size=40), max_size=4))
    data = json.dumps({**base, **changes}).encode()
    return draw(st.one_of(st.just(data), st.just(data), st.just(data), st.binary(max_size=30)))


def messages(kind: Descriptor) -> st.SearchStrategy[Message]:
    """Any message of a type, by its descriptor."""
    fields = {field.name: values(field) for field in kind.fields if not field.message_type or depth(field) < 4}
    made = st.fixed_dictionaries({}, optional=fields)
    return made.map(lambda content: getattr(pb, kind.name)(**only_one_of(kind, content)))


def only_one_of(kind: Descriptor, content: dict[str, Any]) -> dict[str, Any]:
    for group in kind.oneofs:
        for name in [field.name for field in group.fields if field.name in content][1:]:
            del content[name]
    return content


def depth(field: FieldDescriptor) -> int:
    inner = [f for f in field.message_type.fields if f.message_type] if field.message_type else []
    return 1 + max((depth(f) for f in inner), default=0)


def values(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    """Of a field: of the range that its type can say, small ones mostly."""
    entry = field.message_type
    if entry and entry.GetOptions().map_entry:
        return st.dictionaries(values(entry.fields[0]), values(entry.fields[1]), max_size=3)
    one: st.SearchStrategy[Any]
    if entry:
        one = messages(entry)
    elif field.cpp_type in (FieldDescriptor.CPPTYPE_STRING,):
        one = (
            WORDS.filter(lambda text: "\ud83d" not in text) if field.type != FieldDescriptor.TYPE_BYTES else st.binary()
        )
    elif field.cpp_type in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        one = st.floats(width=32) | st.floats(0, 2, width=32)
    elif field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        one = st.booleans()
    else:
        signed = field.cpp_type in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64)
        bits = 64 if field.cpp_type in (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64) else 32
        most = 2 ** (bits - signed) - 1
        one = st.integers(0, 310) | st.integers(-most - 1 if signed else 0, most)
    return st.lists(one, max_size=6) if field.is_repeated else one


class Canary:
    """Asks for the same answer over and over, beside whatever else happens."""

    BODY = {"prompt": [9, 8, 7], "max_tokens": 60, "seed": 3, "ignore_eos": True, "return_token_ids": True}

    def __init__(self, url: str) -> None:
        self._url = url
        self._alone = self._ask()
        self._stop = threading.Event()
        self.rounds = 0
        self.problem: str | None = None
        self._thread = threading.Thread(target=self._run)

    def _ask(self) -> list[int]:
        answer = http.post(f"{self._url}/v1/completions", json=self.BODY)
        answer.raise_for_status()
        return answer.json()["choices"][0]["token_ids"]

    def _run(self) -> None:
        try:
            while not self._stop.is_set() and self.problem is None:
                if (tokens := self._ask()) != self._alone:
                    self.problem = f"{tokens} instead of {self._alone}"
                self.rounds += 1
        except httpx.HTTPError as error:
            self.problem = repr(error)

    def __enter__(self) -> "Canary":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


@pytest.fixture(autouse=True)
def canary(two_replicas: RunningServer) -> Iterator[None]:
    before = processes(two_replicas, "Worker") + processes(two_replicas, "Replica")
    with Canary(two_replicas.url) as canary:
        yield
    assert canary.problem is None
    assert canary.rounds
    assert processes(two_replicas, "Worker") + processes(two_replicas, "Replica") == before
    assert http.get(f"{two_replicas.url}/health").status_code == 200


MANY = settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)


@pytest.mark.parametrize("route", ROUTES)
def test_any_body_is_answered_or_refused(two_replicas: RunningServer, route: str) -> None:
    with httpx.Client(base_url=two_replicas.url, timeout=300) as client:

        @MANY
        @given(bodies(route))
        def ask(body: bytes) -> None:
            answer = client.post(route, content=body)
            assert answer.status_code < 500, (body, answer.text)
            if answer.status_code >= 400:
                assert len(answer.json()["error"]["message"]) < 1000

        ask()


@pytest.mark.parametrize("call", ["Generate", "Chat", "Embed", "Tokenize", "Detokenize", "ListModels"])
def test_any_message_is_answered_or_refused(two_replicas: RunningServer, call: str) -> None:
    kind = {"Generate": "GenerateRequest", "Chat": "ChatRequest"}.get(call, f"{call}Request")
    refusals = {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.FAILED_PRECONDITION,
    }
    with grpc.insecure_channel(two_replicas.grpc) as channel:
        method = getattr(inference_pb2_grpc.InferenceStub(channel), call)

        @MANY
        @given(messages(pb.DESCRIPTOR.message_types_by_name[kind]))
        def ask(message: Message) -> None:
            try:
                answer = method(message, timeout=300)
                if call in ("Generate", "Chat"):
                    list(answer)
            except grpc.RpcError as error:
                assert error.code() in refusals, (message, error)

        ask()
