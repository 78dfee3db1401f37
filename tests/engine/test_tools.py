"""The tools of a request, JSON that comes in pieces, and the choice of a format."""

import json
from typing import Any

import pytest
from call_formats import bound
from hypothesis import given
from hypothesis import strategies as st
from quire_engine.errors import InvalidParameter
from quire_engine.guidance.schemas import closed
from quire_engine.text.formats.chat import ToolUse
from quire_engine.text.formats.detect import detect, format_of
from quire_engine.text.formats.families import CALL_NAMES, CALLS, PLAIN, REASONING, REASONING_NAMES
from quire_engine.text.formats.json_reader import JsonReader
from quire_engine.text.formats.schema import typed, types_of
from quire_engine.text.formats.tools import MAX_TOOLS, Tool, tools_of

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
OBJECTS = st.dictionaries(st.text(), VALUES, max_size=4)


def deep(levels: int) -> Any:
    value: Any = {}
    for _ in range(levels):
        value = {"items": value}
    return value


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f"} | fields}


def test_tools_are_read_from_openais_json() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": True}
    assert tools_of([function(description="does", parameters=schema, strict=True)]) == [Tool("f", "does", schema, True)]
    del schema["additionalProperties"]
    (closed,) = tools_of([function(parameters=schema)])
    assert closed.parameters == schema | {"additionalProperties": False}, "no other arguments than those it names"
    (open_,) = tools_of([function(parameters={"type": "object"})])
    assert open_.parameters == {"type": "object"}
    (nulls,) = tools_of([function(parameters={"type": "object", "properties": None, "required": None})])
    assert nulls == open_
    (bare,) = tools_of([function()])
    assert bare.parameters == {"type": "object", "properties": {}, "additionalProperties": False}
    assert tools_of(None) == []


@pytest.mark.parametrize(
    "raw",
    [
        {},
        "f",
        [1],
        [{"type": "web_search"}],
        [{"type": "function"}],
        [function(name="")],
        [function(name="a" * 65)],
        [function(name="a b")],
        [function(name="f\n")],
        [function(), function()],
        [function(name=f"f{place}") for place in range(MAX_TOOLS + 1)],
        [function(parameters=[])],
        [function(parameters={"type": "string"})],
        [function(parameters={"properties": []})],
        [function(parameters={"required": [1]})],
        [function(parameters=deep(100))],
        [function(parameters=deep(100_000))],
        [function(description="a" * (1 << 19))],
        [function(strict="yes")],
        [function(other=1)],
        [function(parameters={"default": float("nan")})],
    ],
)
def test_what_is_no_list_of_tools_is_refused_by_name(raw: Any) -> None:
    with pytest.raises(InvalidParameter, match="tools") as raised:
        tools_of(raw)
    assert raised.value.parameter == "tools"


@given(value=OBJECTS, indent=st.sampled_from([None, 2]), ascii=st.booleans(), after=st.text(max_size=3))
def test_json_is_found_complete_where_it_is(value: Any, indent: int | None, ascii: bool, after: str) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii)
    text = text.encode("utf-8", "replace").decode()
    whole = JsonReader()
    assert whole.take(text + after, 0) == len(text)
    assert whole.done
    pieces = JsonReader()
    for letter in text:
        assert not pieces.done
        assert pieces.take(letter, 0) == 1
    assert pieces.done


@given(value=OBJECTS, data=st.data())
def test_what_is_read_as_json_is_json_or_its_beginning(value: Any, data: st.DataObject) -> None:
    text = json.dumps(value)
    at = data.draw(st.integers(0, len(text)))
    text = text[:at] + data.draw(st.text('{}[]",:\\ntrue0.e-', max_size=2)) + text[at + data.draw(st.integers(0, 2)) :]
    reader = JsonReader()
    end = reader.take(text, 0)
    try:
        valid = isinstance(json.loads(text), dict)  # what is left may be a number: that is no call's arguments
    except ValueError:
        valid = False
    if valid:
        assert reader.done and end == len(text)
    elif reader.done:
        json.loads(text[:end])


def test_types_follow_references_and_end() -> None:
    root = {"$defs": {str(n): {"anyOf": [{"$ref": f"#/$defs/{(n + k) % 40}"} for k in range(1, 9)]} for n in range(40)}}
    assert len(types_of({"$ref": "#/$defs/0"}, root)) == 7
    root = {"$defs": {"n": {"type": ["integer", "null"]}, "s": {"enum": ["a", None]}}}
    assert types_of({"$ref": "#/$defs/n"}, root) == {"integer", "null"}
    assert types_of({"$ref": "#/$defs/s"}, root) == {"string", "null"}
    assert types_of({"type": "number"}, root) == {"number", "integer"}


@given(value=VALUES)
def test_a_bare_value_of_its_type_is_itself(value: Any) -> None:
    kinds = frozenset({"string", "integer", "number", "boolean", "null", "array", "object"})
    if not isinstance(value, str):
        assert json.loads(typed(json.dumps(value), kinds)) == value
    text = value if isinstance(value, str) else json.dumps(value)
    assert json.loads(typed(text, frozenset({"string"}))) == text


def test_calls_and_reasoning_are_named_apart() -> None:
    assert format_of("glm45", None, otherwise=PLAIN).calls is CALLS["glm45"]
    assert format_of("glm45", None, otherwise=PLAIN).reasoning is PLAIN.reasoning
    assert format_of(None, "deepseek_r1", otherwise=PLAIN).reasoning is REASONING["think"]
    assert format_of("none", "none", otherwise=PLAIN).calls is None
    for parameter, names in (("tool_call_parser", CALL_NAMES), ("reasoning_parser", REASONING_NAMES)):
        with pytest.raises(InvalidParameter, match="hermes" if names is CALL_NAMES else "qwen3") as raised:
            format_of(
                *("nobody" if parameter == one else None for one in ("tool_call_parser", "reasoning_parser")),
                otherwise=PLAIN,
            )
        assert raised.value.parameter == parameter
    assert all(name in CALLS for name in CALL_NAMES.values())
    assert all(name in REASONING for name in REASONING_NAMES.values())


@pytest.mark.parametrize(
    ("template", "calls", "reasoning"),
    [
        ("<tool_call>\n{'name'}</tool_call> <think></think>", "hermes", "think"),
        ("<tool_call>\n<function=a>\n<parameter=b> <think></think>", "qwen3_coder", "think"),
        ("<seed:tool_call>\n<function=a>\n<parameter=b> <seed:think>", "seed_oss", "seed_oss"),
        ("<tool_call>f\n<arg_key>k</arg_key><arg_value> <think></think>", "glm45", "think"),
        ("<|start|>assistant<|channel|>analysis<|message|>", "openai", "openai"),
        ("[TOOL_CALLS] [THINK]", "mistral", "mistral"),
        ("<|python_tag|>", "llama3_json", None),
        ("hello", None, None),
    ],
)
def test_a_chat_template_tells_the_format(template: str, calls: str | None, reasoning: str | None) -> None:
    found = detect(template, bound(PLAIN, tokens=False).tokenizer)
    assert found.calls is (CALLS[calls] if calls else None)
    assert found.reasoning is (REASONING[reasoning] if reasoning else None)


def test_objects_that_name_their_properties_have_no_others() -> None:
    """Unless they say so, or are put together of several schemas: then it might leave nothing that is right."""
    inner = {"type": "object", "properties": {"b": {"type": "string"}}}
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": inner}}, "required": ["a"]}
    shut = {"additionalProperties": False}
    assert closed(schema, "x") == schema | {"properties": {"a": {"type": "array", "items": inner | shut}}} | shut
    for same in (
        {"type": "object"},
        inner | {"additionalProperties": True},
        inner | {"required": ["c"]},
        inner | {"required": [["b"]]},
        {"allOf": [inner, {"properties": {"c": {}}}]},
        {"properties": {"c": {}}, "anyOf": [inner]},
        {"enum": [inner]},
        "text",
        True,
    ):
        assert closed(same, "x") == same
    with pytest.raises(InvalidParameter, match="deep"):
        closed(deep(100), "x")


def test_tool_choices_are_openais() -> None:
    raw = [function(name=name) for name in ("f", "g", "h")]
    one = {"type": "function", "function": {"name": "g"}}

    def chosen(choice: Any, parallel: bool | None = None) -> tuple[str, list[str], bool]:
        use = ToolUse.of(raw, choice, parallel)
        return use.choice, [tool.name for tool in use.callable], use.parallel

    assert chosen(None) == chosen("auto") == ("auto", ["f", "g", "h"], True)
    assert chosen("required", False) == ("required", ["f", "g", "h"], False)
    assert chosen("none") == ("none", [], True)
    assert chosen(one) == ("required", ["g"], False)
    some = {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "auto", "tools": [one, one | {"function": {"name": "h"}}]},
    }
    assert chosen(some) == ("auto", ["g", "h"], True)
    for wrong in (
        "any",
        5,
        [],
        {},
        {"type": "function"},
        one | {"function": {"name": "z"}},
        some | {"allowed_tools": {}},
    ):
        with pytest.raises(InvalidParameter, match="tool_choice"):
            ToolUse.of(raw, wrong, None)
    assert ToolUse.of(None, "auto", None).callable == ()
    with pytest.raises(InvalidParameter, match="tool_choice"):
        ToolUse.of(None, "required", None)
