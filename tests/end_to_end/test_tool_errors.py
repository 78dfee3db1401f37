"""Whatever is sent as tools, tool_choice, response_format or structured_outputs gets an answer, or a refusal that names
the field: the same over HTTP and gRPC, and never an error of the server's own."""

import json
from typing import Any

import grpc
import pytest
from conftest import RunningServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nonsense import CHOICES, FORMATS, JSON, STRUCTURES, TOOLS, function, of, schema_format
from quire_protos.v1 import inference_pb2 as pb
from quire_protos.v1 import inference_pb2_grpc
from web import http

ASK = [{"role": "user", "content": "Hello"}]


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


def tags(number: int) -> dict[str, Any]:
    structures = [{"begin": f"<{place}>", "schema": {}, "end": "."} for place in range(number)]
    return {"type": "structural_tag", "structures": structures, "triggers": ["<"]}


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"tools": {}}, "tools"),
    ({"tools": [1]}, "tools"),
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools"),
    ({"tools": [function("é")]}, "tools"),
    ({"tools": [function("f" * 65)]}, "tools"),
    ({"tools": [function(), function()]}, "tools"),
    ({"tools": [function(parameters=[])]}, "tools"),
    ({"tools": [function(parameters={"type": "array"})]}, "tools"),
    ({"tools": [function(parameters=of(a={"type": "nope"}))]}, "tools"),
    ({"tools": [function(parameters=of(a={"$ref": "#/$defs/none"}))]}, "tools"),
    ({"tools": [function(parameters=of(a={"uniqueItems": True}), strict=True)]}, "tools"),
    ({"tools": [function(parameters=of(a={"pattern": "("}), strict=True)]}, "tools"),
    ({"tools": [function(description="x" * (1 << 18))]}, "tools"),
    ({"tools": [function(str(number)) for number in range(129)]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [function()], "tool_choice": "any"}, "tool_choice"),
    ({"tools": [function()], "tool_choice": function("g")}, "tool_choice"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs"),
    ({"structured_outputs": {"choice": [None]}}, "structured_outputs"),
    ({"structured_outputs": {"choice": [str(number) for number in range(10_001)]}}, "structured_outputs"),
    ({"structured_outputs": {"choice": ["a" * (1 << 17), "b" * (1 << 17), "c"]}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a" * ((1 << 18) + 1)}}, "structured_outputs"),
    ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs"),
    ({"structured_outputs": {"grammar": 'start: "' + "a" * (1 << 18) + '"'}}, "structured_outputs"),
    ({"structured_outputs": {"json": of(**{f"p{number}": {} for number in range(4001)})}}, "structured_outputs"),
    ({"structured_outputs": {"json": deep(65)}}, "structured_outputs"),
    ({"structured_outputs": {"structural_tag": tags(257)}}, "structured_outputs"),
    ({"structured_outputs": {"json": of(a={"type": "nope"})}}, "structured_outputs"),
    ({"tools": [function()], "structured_outputs": {"structural_tag": "{}"}}, "structured_outputs"),
    ({"thinking_token_budget": 2**31}, "thinking_token_budget"),
    ({"chat_template_kwargs": {"deep": True}}, "chat_template_kwargs"),
    ({"tools": [function()], "tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
]


@pytest.mark.parametrize(("options", "parameter"), WRONG)
def test_what_is_wrong_is_refused_by_name_over_http_and_grpc(
    demo: RunningServer, options: dict[str, Any], parameter: str
) -> None:
    response = http.post(f"{demo.url}/v1/chat/completions", json={"messages": ASK, "max_tokens": 4} | options)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == parameter
    request = over_grpc(options)
    if request is not None:
        with pytest.raises(grpc.RpcError) as failed, grpc.insecure_channel(demo.grpc) as channel:
            list(inference_pb2_grpc.InferenceStub(channel).Chat(request))
        assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert parameter in (failed.value.details() or "") or parameter == "tool_choice"


def over_grpc(options: dict[str, Any]) -> pb.ChatRequest | None:
    """The same; None where no message can say it."""
    given = dict(options)
    if not isinstance(given.get("tools", []), list):
        return None
    sampling = {name: given.pop(name) for name in ("thinking_token_budget", "ignore_eos") if name in given}
    request = pb.ChatRequest(messages=[pb.ChatMessage(role="user", content="Hello")])
    try:
        for tool in given.pop("tools", []):
            fields = dict(tool["function"])
            if "parameters" in fields:
                fields["parameters"] = json.dumps(fields["parameters"])
            request.tools.add(**fields)
        choice = given.pop("tool_choice", None)
        if isinstance(choice, str):
            request.tool_choice = choice
        elif choice is not None:
            request.tool_name = choice["function"]["name"]
        if "chat_template_kwargs" in given:
            request.chat_template_kwargs = json.dumps(given.pop("chat_template_kwargs"))
        [(kind, value)] = given.pop("structured_outputs", {"": None}).items() or [("none", None)]
        if kind == "choice":
            value = pb.Choices(texts=value)
        if kind in ("json", "structural_tag") and not isinstance(value, str):
            value = json.dumps(value)
        if kind:
            structure = pb.StructuredOutputs(**({kind: value} if value is not None else {}))
            sampling["structured_outputs"] = structure
        request.sampling.CopyFrom(pb.SamplingParams(max_tokens=4, **sampling))
    except (TypeError, KeyError):
        return None
    assert not given
    return request


@pytest.mark.parametrize(
    "wrong",
    [
        {"type": "xml"},
        {"type": "json_schema"},
        {"type": "json_object", "json_schema": {"schema": {}}},
        schema_format({"type": "nope"}),
        schema_format({"type": "array", "uniqueItems": True}),
        schema_format("{"),
        schema_format(5),
        schema_format(of(**{"a" * 300_000: {}})),
        schema_format({}, colour="red"),
        "json",
    ],
)
def test_a_wrong_response_format_is_refused_by_its_name(demo: RunningServer, wrong: Any) -> None:
    body = {"messages": ASK, "max_tokens": 4, "response_format": wrong}
    response = http.post(f"{demo.url}/v1/chat/completions", json=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == "response_format"
    assert "structured_outputs" not in response.json()["error"]["message"]


BODIES = st.fixed_dictionaries(
    {},
    optional={
        "tools": TOOLS | JSON,
        "tool_choice": CHOICES,
        "response_format": FORMATS,
        "structured_outputs": STRUCTURES,
        "parallel_tool_calls": st.booleans(),
        "thinking_token_budget": st.integers(-1, 3),
    },
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(body=BODIES)
def test_nothing_that_is_sent_is_an_error_of_the_servers(demo: RunningServer, body: dict[str, Any]) -> None:
    data = json.dumps({"messages": ASK, "max_tokens": 3} | body).encode()
    response = http.post(f"{demo.url}/v1/chat/completions", content=data)
    assert response.status_code in (200, 400), response.text
    if response.status_code == 400:
        error = response.json()["error"]
        assert error["message"]
        assert error["param"] is None or error["param"] in body, error
