"""Grammars of calls: what was rendered is accepted, and what they let a model write is read as valid calls."""

import random
from functools import cache

import jsonschema
import llguidance
import numpy as np
import pytest
from call_formats import ARGUMENTS, NAMES, TOOLS, Family, calls_of, family, parse, text_of
from llguidance.hf import from_tokenizer
from quire_engine.text.formats.grammar import call_rules
from quire_engine.text.formats.tools import Tool

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
