"""Whatever is sent as tools, tool_choice, response_format or structured_outputs gets an answer, or a refusal that names
the field: the same over HTTP and gRPC, and never an error of the server's own."""

import json
from typing import Any

import grpc
import pytest
from conftest import RunningServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quire_protos.v1 import inference_pb2 as pb
from quire_protos.v1 import inference_pb2_grpc
from web import http

ASK = [{"role": "user", "content": "Hello"}]


def function(name: Any = "f", **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name} | fields}


def of(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


def schema_format(schema: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema} | fields}


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
    ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs"),
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


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
KEYWORDS = st.sampled_from(
    [
        *(
            "type",
            "properties",
            "required",
            "items",
            "enum",
            "const",
            "anyOf",
            "oneOf",
            "allOf",
            "$ref",
            "$defs",
            "not",
        ),
        *("pattern", "format", "minimum", "maximum", "minLength", "maxItems", "additionalProperties", "uniqueItems"),
        *("name", "parameters", "function", "strict", "description", "json_schema", "schema", "regex", "choice"),
    ]
)
TYPES = st.sampled_from(["object", "array", "string", "integer", "number", "null", "function", "json_schema", "#"])
JSON = st.recursive(
    LEAVES | TYPES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYWORDS | st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
PARAMETERS = st.builds(lambda more, a: of(a=a) | more, st.dictionaries(KEYWORDS, JSON, max_size=2), JSON)
TOOLS = st.lists(
    st.builds(lambda name, schema: function(name, parameters=schema), st.sampled_from(["f", "g", "h-1"]), PARAMETERS)
    | JSON,
    max_size=3,
)
CHOICES = st.sampled_from(["auto", "none", "required", function("f"), {"type": "function"}]) | JSON
FORMATS = st.builds(schema_format, JSON | PARAMETERS) | JSON
KINDS = st.sampled_from(["json", "json_object", "regex", "choice", "grammar", "structural_tag"])
FIELDS = st.sampled_from(["regex", "grammar", "json_schema", "any_text"])
CONTENTS = st.builds(lambda kind, field, value: {"type": kind, field: value}, FIELDS, FIELDS, JSON) | JSON
TAG = st.builds(lambda content: {"begin": "<a>", "content": content, "end": "</a>"}, CONTENTS) | JSON
FORMAT_OF_TAGS = st.builds(
    lambda tags: {"type": "triggered_tags", "triggers": ["<a"], "tags": tags}, st.lists(TAG, max_size=2)
)
TAGS = st.builds(lambda given: {"type": "structural_tag", "format": given}, FORMAT_OF_TAGS | JSON)
BODIES = st.fixed_dictionaries(
    {},
    optional={
        "tools": TOOLS | JSON,
        "tool_choice": CHOICES,
        "response_format": FORMATS,
        "structured_outputs": st.dictionaries(
            st.sampled_from(["json", "regex", "choice", "grammar"]), JSON, max_size=1
        ),
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
