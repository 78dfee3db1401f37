"""Grammars of calls: what was rendered is accepted, and what they let a model write is read as valid calls."""

import random
from functools import cache
from typing import Any

import jsonschema
import llguidance
import numpy as np
import pytest
from call_formats import ARGUMENTS, NAMES, TOOLS, Family, calls_of, family, parse, text_of
from llguidance.hf import from_tokenizer
from quire_engine.errors import InvalidParameter
from quire_engine.text.formats.grammar import call_rules
from quire_engine.text.formats.tools import Tool, tools_of

names = pytest.mark.parametrize("name", NAMES)
PARAMETERS = {tool.name: tool.parameters for tool in TOOLS}


@cache
def vocabulary(name: str, tokens: bool) -> llguidance.LLTokenizer:
    return from_tokenizer(family(name, tokens=tokens).backend)


def matcher(one: Family, tools: list[Tool], *, tokens: bool = True, parallel: bool = True) -> llguidance.LLMatcher:
    rules = call_rules(one.form, tools, parallel=parallel, most=3)
    grammar = llguidance.LLMatcher.grammar_from_lark(f"start: calls_all\n{rules.lark}")
    made = llguidance.LLMatcher(vocabulary(one.name, tokens), grammar)
    assert not made.get_error(), made.get_error()
    return made


def accepted(made: llguidance.LLMatcher, tokens: list[int]) -> bool:
    return made.try_consume_tokens(tokens) == len(tokens) and made.is_accepting()


@names
@pytest.mark.parametrize("tokens", [True, False], ids=["tokens", "text"])
def test_what_was_rendered_is_accepted(name: str, tokens: bool) -> None:
    one = family(name, tokens=tokens)
    for arguments in ARGUMENTS:
        for calls in ([("run_in_terminal", arguments)], [("run_in", arguments), ("now", {}), ("run_in", {})]):
            text = one.turn("", calls).strip("\n")
            if name == "phi4_mini_json" and not tokens:  # as those of its models write it that lack the tokens
                text = text.replace("<|tool_call|>", "functools").replace("<|/tool_call|>", "")
            ids = one.tokenizer.encode(text, add_special_tokens=False)
            assert accepted(matcher(one, TOOLS, tokens=tokens), ids), text
            assert not accepted(matcher(one, TOOLS[2:], tokens=tokens), ids)
            if len(calls) > 1:
                assert not accepted(matcher(one, TOOLS, tokens=tokens, parallel=False), ids)


@names
@pytest.mark.parametrize("seed", range(6))
def test_whatever_a_grammar_lets_through_is_read_as_valid_calls(name: str, seed: int) -> None:
    one, draw = family(name), random.Random(seed)
    made = matcher(one, TOOLS)
    ids: list[int] = []
    while not made.is_stopped() and len(ids) < 3000:
        mask = np.unpackbits(np.frombuffer(made.compute_bitmask(), np.uint8), bitorder="little")
        allowed = np.flatnonzero(mask).tolist()
        if one.backend.eos_token_id in allowed:
            break
        forced = likely(one, allowed, draw, len(ids))
        assert made.consume_token(forced), made.get_error()
        ids.append(forced)
    assert made.is_accepting(), made.get_error()
    pieces = parse(one.form, one.marked(ids), TOOLS, False)
    calls = calls_of(pieces)
    assert 1 <= len(calls) <= 3, one.tokenizer.decode(ids, skip_special_tokens=False)
    assert text_of(pieces, "content") == ""
    for called, arguments in calls:
        jsonschema.validate(arguments, PARAMETERS[called])


def likely(one: Family, allowed: list[int], draw: random.Random, length: int) -> int:
    """Any token, but those that end something the oftener the longer the text is."""
    if draw.random() < min(length / 300, 0.9):
        ends = [
            token for token in allowed if one.tokenizer.token_bytes(token)[:1] in b'"}])\n<' or token in one.form.marks
        ]
        allowed = ends or allowed
    return draw.choice(allowed)


def strict(**properties: Any) -> list[Tool]:
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return tools_of([{"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}])


@pytest.mark.parametrize(
    ("name", "schema", "named"),
    [
        ("hermes", {"type": "string", "pattern": "(?=a)b"}, "'f'"),
        ("hermes", {"not": {"type": "string"}}, "not"),
        ("qwen3_coder", {"type": "string", "pattern": "a+"}, "'pattern'"),
        ("qwen3_coder", {"type": "string", "maxLength": 3}, "'maxLength'"),
        ("pythonic", {"type": "integer", "minimum": 3}, "'minimum'"),
        ("gemma4", {"type": "array", "items": {"type": "string"}, "maxItems": 2}, "'maxItems'"),
    ],
)
def test_a_strict_schema_that_cannot_be_held_to_is_refused_by_name(name: str, schema: Any, named: str) -> None:
    with pytest.raises(InvalidParameter, match="strict") as raised:
        call_rules(family(name).form, strict(a=schema), parallel=False, most=1)
    assert named in str(raised.value)
    assert raised.value.parameter == "tools"


@names
def test_a_schema_that_is_not_strict_is_kept_to_as_far_as_it_can_be(name: str) -> None:
    loose = [
        Tool(tool.name, "", tool.parameters, False)
        for tool in strict(a={"type": "string", "pattern": "(?=a)b", "x-other": 1}, b={"$ref": "#/$defs/n"})
    ]
    loose[0].parameters["$defs"] = {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}}}
    one = family(name)
    made = matcher(one, loose)
    assert accepted(made, one.tokenizer.encode(one.turn("", [("f", {"a": "x", "b": {"n": {}}})]).strip("\n")))


@names
def test_what_is_no_schema_is_refused(name: str) -> None:
    for schema in ({"properties": [1]}, {"anyOf": 5}, {"type": 5}, 5, {"$ref": 5}, {"enum": 5}):
        tools = [Tool("f", "", {"type": "object", "properties": {"a": schema}}, False)]
        with pytest.raises(InvalidParameter, match="'f'"):
            call_rules(family(name).form, tools, parallel=False, most=1)


def test_the_openers_of_sections_are_told_as_tokens_and_texts() -> None:
    def openers(name: str, **options: Any) -> Any:
        one = family(name, **options)
        rules = call_rules(one.form, TOOLS, parallel=True, most=8)
        texts = {token: one.form.spelled[letter] for token, letter in one.form.marks.items()}
        return [tuple(texts.get(part, part) for part in opener) for opener in rules.signs]

    assert openers("hermes") == openers("hermes", tokens=False) == [("<tool_call>",)]
    assert openers("openai") == [
        ("<|channel|>", "commentary to=functions."),
        ("<|channel|>", "analysis to=functions."),
    ]
    assert openers("phi4_mini_json", tokens=False) == [("functools[",)], "a word alone may be content"
    names = [tool.name for tool in TOOLS]
    assert openers("llama3_json") == [(f'{{"name": "{name}"',) for name in names], "what begins like one may be content"
    assert openers("pythonic") == [(f"[{name}(",) for name in names]
