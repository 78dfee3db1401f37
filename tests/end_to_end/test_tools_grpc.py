"""Tools, structures and histories of calls over gRPC: by our client, sync and async, and by generated stubs alone."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import grpc
import jsonschema
import pytest
from conftest import RunningServer
from quire import AsyncClient, Client
from quire.messages import Output
from quire_engine.errors import InvalidParameter
from quire_protos.v1 import inference_pb2 as pb
from quire_protos.v1 import inference_pb2_grpc
from weather import ASK, SCHEMA, TOOL
from web import http

OTHER = {"type": "function", "function": {"name": "get_stars"}}
NAMED = {"type": "function", "function": {"name": "get_stars"}}
CALLS = {"tools": [TOOL, OTHER], "max_tokens": 150, "seed": 9}
HISTORY = [
    *ASK,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Paris", "days": 1}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "Sunny."}]},
]


@pytest.fixture(scope="module")
def client(demo: RunningServer) -> Iterator[Client]:
    with Client(demo.grpc) as made:
        yield made


def joined(pieces: list[Output]) -> list[tuple[str, str, str]]:
    """Id, name and arguments of each call."""
    calls: list[tuple[str, str, str]] = []
    for piece in pieces:
        for part in piece.tool_calls:
            if part.name:
                assert part.index == len(calls)
                calls.append((part.id, part.name, ""))
            calls[part.index] = (*calls[part.index][:2], calls[part.index][2] + part.arguments)
    return calls


@pytest.mark.parametrize("choice", ["auto", "none", "required", NAMED], ids=["auto", "none", "required", "named"])
def test_calls_are_those_of_http_whole_and_streamed(demo: RunningServer, client: Client, choice: Any) -> None:
    asked = CALLS | {"tool_choice": choice} | ({"max_tokens": 24} if choice in ("auto", "none") else {})
    over_http = http.post(
        f"{demo.url}/v1/chat/completions", json=asked | {"messages": ASK, "return_token_ids": True}
    ).json()["choices"][0]
    [whole] = client.chat(ASK, **asked).outputs
    assert whole.token_ids == over_http["token_ids"]
    assert whole.text == (over_http["message"]["content"] or "")
    assert whole.finish_reason == over_http["finish_reason"]
    functions = [call["function"] for call in over_http["message"].get("tool_calls", [])]
    assert [(call.name, call.arguments) for call in whole.tool_calls] == [
        (f["name"], f["arguments"]) for f in functions
    ]
    pieces = list(client.stream_chat(ASK, **asked))
    assert "".join(piece.text for piece in pieces) == whole.text
    streamed = joined(pieces)
    assert [call[1:] for call in streamed] == [(call.name, call.arguments) for call in whole.tool_calls]
    assert len({call[0] for call in streamed}) == len(streamed)
    if choice == "none":
        assert not whole.tool_calls
    if choice == "required":
        assert whole.tool_calls
    if choice == NAMED:
        assert [call.name for call in whole.tool_calls] == ["get_stars"]


def test_the_async_client_does_the_same(demo: RunningServer, client: Client) -> None:
    asked = CALLS | {"tool_choice": "required", "n": 2, "parallel_tool_calls": False}

    async def run() -> tuple[list[Output], list[Output]]:
        async with AsyncClient(demo.grpc) as remote:
            whole = (await remote.chat(ASK, **asked)).outputs
            return whole, [piece async for piece in remote.stream_chat(ASK, **asked)]

    whole, pieces = asyncio.run(run())
    for output, other in zip(whole, client.chat(ASK, **asked).outputs, strict=True):
        [call], [same] = output.tool_calls, other.tool_calls
        [(_, name, arguments)] = joined([piece for piece in pieces if piece.index == output.index])
        assert (call.name, call.arguments) == (same.name, same.arguments) == (name, arguments)


def test_a_history_of_calls_is_the_same_prompt_as_over_http(demo: RunningServer, client: Client) -> None:
    asked: dict[str, Any] = {"tools": [TOOL], "max_tokens": 12, "temperature": 0}
    over_http = http.post(f"{demo.url}/v1/chat/completions", json=asked | {"messages": HISTORY}).json()
    answer = client.chat(HISTORY, **asked)
    assert answer.prompt_tokens == over_http["usage"]["prompt_tokens"]
    assert answer.text == (over_http["choices"][0]["message"]["content"] or "")


def test_structures_of_every_kind(client: Client) -> None:
    def text(**structure: Any) -> str:
        return client.chat(ASK, structured_outputs=structure, max_tokens=100, seed=1).text

    jsonschema.validate(json.loads(text(json=SCHEMA)), SCHEMA)
    jsonschema.validate(json.loads(text(json=json.dumps(SCHEMA))), SCHEMA)
    assert text(choice=["sun", "rain"]) in ("sun", "rain")
    assert text(regex="[0-9]{3}").isdigit()
    assert text(grammar='root ::= "a" "b"') == "ab"


def test_stubs_generated_from_the_proto_are_enough(demo: RunningServer) -> None:
    def chat(**fields: Any) -> tuple[list[pb.CallDelta], str]:
        with grpc.insecure_channel(demo.grpc) as channel:
            sampling = pb.SamplingParams(max_tokens=100, temperature=0)
            request = pb.ChatRequest(sampling=sampling, **fields)
            messages = list(inference_pb2_grpc.InferenceStub(channel).Chat(request))
        [reason] = [message.finish_reason for message in messages if message.HasField("finish_reason")]
        return [call for message in messages for call in message.calls], reason

    tool = pb.Tool(name="get_weather", description="Of a city.", parameters=json.dumps(SCHEMA), strict=True)
    question = pb.ChatMessage(role="user", content="What is the weather in Paris?")
    parts, reason = chat(messages=[question], tools=[tool], tool_name="get_weather")
    assert reason == "tool_calls"
    assert [part.name for part in parts if part.HasField("name")] == ["get_weather"]
    assert [part.HasField("id") for part in parts] == [True] + [False] * (len(parts) - 1)
    arguments = "".join(part.arguments for part in parts)
    jsonschema.validate(json.loads(arguments), SCHEMA)
    call = pb.ToolCall(id=parts[0].id, name="get_weather", arguments=arguments)
    turn = pb.ChatMessage(role="assistant", tool_calls=[call])
    result = pb.ChatMessage(role="tool", tool_call_id=call.id, content="Sunny.")
    parts, reason = chat(messages=[question, turn, result], tools=[tool], tool_choice="none")
    assert not parts
    assert reason in ("stop", "length")


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"tools": 5}, "tools"),
        ({"tools": [{}]}, "tools"),
        ({"tools": [TOOL | {"type": "custom"}]}, "tools"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [TOOL], "tool_choice": 5}, "tool_choice"),
        ({"tools": [TOOL], "parallel_tool_calls": "yes"}, "parallel_tool_calls"),
        ({"chat_template_kwargs": {"a": {1}}}, "chat_template_kwargs"),
        ({"structured_outputs": {"xml": "a"}}, "structured_outputs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"priority": "high"}, "priority"),
    ],
)
def test_what_cannot_be_sent_is_refused_by_name(client: Client, options: dict[str, Any], parameter: str) -> None:
    with pytest.raises(InvalidParameter, match=parameter) as refused:
        client.chat(ASK, **options)
    assert refused.value.parameter == parameter


@pytest.mark.parametrize(
    "messages",
    [
        [{"content": "x"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
        [{"role": "user", "content": "x", "tool_calls": [{}]}],
        [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{"}}]}],
        [{"role": "tool", "tool_call_id": "1", "content": "x"}],
    ],
)
def test_messages_that_are_wrong_are_refused_as_over_http(
    demo: RunningServer, client: Client, messages: list[dict[str, Any]]
) -> None:
    over_http = http.post(f"{demo.url}/v1/chat/completions", json={"messages": messages})
    with pytest.raises(InvalidParameter) as refused:
        client.chat(messages)
    assert over_http.status_code == 400
    assert over_http.json()["error"]["param"] == refused.value.parameter == "messages"
    assert str(refused.value) in over_http.json()["error"]["message"]
