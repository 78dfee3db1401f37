"""Tools' schemas in every way of writing calls: what they refer to, what they name, and what is too much."""

import json
from typing import Any

import pytest
from call_formats import NAMES, calls_of, family
from quire_engine.errors import InvalidParameter
from quire_engine.text.formats.grammar import call_rules
from quire_engine.text.formats.schema import types_of
from quire_engine.text.formats.tools import Tool, tools_of
from test_format_grammars import accepted, matcher

names = pytest.mark.parametrize("name", NAMES)
TAGGED = ["qwen3_coder", "glm45", "minimax_m2"]


def tool(parameters: dict[str, Any], *, strict: bool = False) -> list[Tool]:
    closed = {"type": "object", "required": list(parameters["properties"])} | parameters
    return tools_of([{"type": "function", "function": {"name": "f", "parameters": closed, "strict": strict}}])


def takes(name: str, tools: list[Tool], arguments: dict[str, Any], *, tokens: bool = True) -> bool:
    """Whether a call may be written as its family's template does. What may is read back the same."""
    one = family(name, tokens=tokens)
    text = one.turn("", [("f", arguments)]).strip("\n")
    if name == "phi4_mini_json" and not tokens:
        text = text.replace("<|tool_call|>", "functools").replace("<|/tool_call|>", "")
    may = accepted(matcher(one, tools, tokens=tokens), one.tokenizer.encode(text, add_special_tokens=False))
    if may:
        assert calls_of(one.read(text, tools)) == [("f", arguments)]
    return may


@names
def test_a_schema_that_refers_to_itself(name: str) -> None:
    """From a part of it, which has a rule of its own where arguments are written apart."""
    number = {"type": "integer"}
    tools = tool(
        {
            "properties": {
                "more": {"type": "array", "items": {"$ref": "#"}},
                "same": {"$ref": "#/properties/n"},
                "n": number,
            },
            "required": ["n"],
        },
        strict=True,
    )
    assert takes(name, tools, {"more": [{"more": [], "n": 1}, {"n": 2}], "same": 3, "n": 4})
    assert not takes(name, tools, {"more": [[]], "n": 4})
    assert not takes(name, tools, {"more": [{"n": "1"}], "n": 4})
    assert not takes(name, tools, {"same": [], "n": 4})


@names
def test_definitions_are_not_repeated_where_nothing_refers_to_them(name: str) -> None:
    many = {"properties": {f"p{n}": {"type": "integer"} for n in range(600)}, "$defs": {"a": {"const": "x" * 9000}}}
    one, tools = {"$defs": {"n": {"$ref": "#/$defs/m"}, "m": {"type": "boolean"}, "o": {}}}, tool(many)
    assert len(call_rules(family(name).form, tools, parallel=False, most=1).lark) < 20 * len(json.dumps(many))
    tools = tool({"properties": {"a": {"type": "array", "items": {"$ref": "#/$defs/n"}}}} | one)
    assert takes(name, tools, {"a": [True, False]})
    assert not takes(name, tools, {"a": [1]})


@pytest.mark.parametrize("name", TAGGED)
@pytest.mark.parametrize("tokens", [True, False], ids=["tokens", "text"])
def test_what_closes_a_value_may_stand_in_the_strings_of_a_list_or_an_object(name: str, tokens: bool) -> None:
    edit = {"type": "object", "properties": {"old": {"type": "string"}}, "required": ["old"]}
    tools = tool({"properties": {"edits": {"type": "array", "items": edit}, "n": {"type": "integer"}}})
    for close in ("</parameter>", "\n</parameter>\n", '"</parameter>\\"', "</arg_value>", "]</invoke>"):
        if tokens and name == "glm45" and "arg" in close:
            continue  # a token, which no text holds
        assert takes(name, tools, {"edits": [{"old": close}, {"old": "}"}], "n": 1}, tokens=tokens)


@pytest.mark.parametrize("name", TAGGED)
def test_a_value_that_is_no_json_ends_where_it_is_closed(name: str) -> None:
    """As models write that nothing holds to a schema."""
    one, tools = family(name), tool({"properties": {"a": {"type": "array"}, "b": {"type": "integer"}}})
    for wrong in ("{'a': [", '["it"s, [', "x", ""):
        text = one.turn("", [("f", {"a": wrong, "b": 1})])
        assert calls_of(one.read(text, tools)) == [("f", {"a": wrong, "b": 1})]


@pytest.mark.parametrize("name", TAGGED)
def test_properties_that_refer_to_too_much_are_refused(name: str) -> None:
    large = {"type": "array", "items": {"const": "x" * 100_000}}
    tools = tool({"properties": {f"p{n}": {"$ref": "#/$defs/a"} for n in range(100)}, "$defs": {"a": large}})
    with pytest.raises(InvalidParameter, match="too much"):
        call_rules(family(name).form, tools, parallel=False, most=1)


@names
def test_a_long_way_of_references_has_an_end(name: str) -> None:
    steps = {f"a{n}": {"$ref": f"#/$defs/a{n + 1}"} for n in range(2000)} | {"a2000": {"type": "string"}}
    schema = {"properties": {"a": {"$ref": "#/$defs/a0"}}, "$defs": steps}
    assert types_of(schema["properties"]["a"], schema) >= {"string"}
    assert takes(name, tool(schema), {"a": "x"})
