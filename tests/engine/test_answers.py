"""Answers to conversations, from what a request asks for to what is read: for every format, one description masks and
parses them."""

import json
import random
from functools import cache
from typing import Any

import jsonschema
import numpy as np
import pytest
from call_formats import NAMES, REASONING_OF, TOOLS, Family, family
from quire_engine.guidance.compiled import Guide
from quire_engine.guidance.cursor import Cursor
from quire_engine.guidance.spec import GuidanceSpec
from quire_engine.guidance.structure import StructuredOutputs
from quire_engine.guidance.vocabulary import Vocabulary
from quire_engine.text.formats.chat import Answer, ChatFormat, ToolUse
from quire_engine.text.output import OutputText, Shown
from quire_engine.text.params import SamplingParams
from test_format_grammars import likely

names = pytest.mark.parametrize("name", NAMES)
either = pytest.mark.parametrize("tokens", [True, False], ids=["tokens", "text"])
PARAMETERS = {tool.name: tool.parameters for tool in TOOLS}
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "y": {"enum": [1, 2]}},
    "required": ["x", "y"],
    "additionalProperties": False,
}
STRUCTURE = StructuredOutputs(json=POINT)
TEXT_ENDS = {
    "qwen3_coder": ("\n</parameter>",),
    "seed_oss": ("</parameter>",),
    "minimax_m2": ("</parameter>",),
    "glm45": ("</arg_value>",),
    "functiongemma": ("<escape>",),
    "gemma4": ('<|"|>',),
}
THOUGHT = "Should <I>, or not?"


@cache
def vocabulary(name: str, tokens: bool) -> Vocabulary:
    tokenizer = family(name, tokens=tokens).tokenizer
    return Vocabulary(
        tokens=[tokenizer.token_bytes(token) for token in range(tokenizer.size)],
        delimiters=frozenset(tokenizer.delimiters.values()),
        ends=(tokenizer.end_token or 0,),
        size=tokenizer.size,
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False),
    )


@cache
def chat_format(name: str, tokens: bool) -> ChatFormat:
    tokenizer = family(name, tokens=tokens).tokenizer
    return ChatFormat(tokenizer, tool_parser=name, reasoning_parser=REASONING_OF.get(name, "none"))


def asked(name: str, tokens: bool, use: ToolUse, prompt: str = "", **options: Any) -> Answer:
    ids = family(name, tokens=tokens).tokenizer.encode(prompt, add_special_tokens=False)
    return chat_format(name, tokens).answer(ids, use, options.pop("structure", None), **options)


def written(name: str, tokens: bool, answer: Answer, seed: int, *, free: str = "") -> list[int]:
    """A random answer under the masks; `free`: what is written where everything may be, until there is a mask."""
    one, draw = family(name, tokens=tokens), random.Random(seed)
    assert answer.guidance is not None
    spec = GuidanceSpec.from_json(answer.guidance.to_json())
    cursor = Cursor(Guide(spec, known := vocabulary(name, tokens)))
    script, ids = iter(one.tokenizer.encode(free, add_special_tokens=False)), []
    while len(ids) < 6000:
        if cursor.matcher is not None:
            script = iter(())
            mask = np.unpackbits(np.frombuffer(cursor.matcher.compute_bitmask(), np.uint8), bitorder="little")
            allowed = [*np.flatnonzero(mask).tolist(), *cursor.besides]
        elif cursor.only is not None:
            allowed = list(cursor.only)
        else:
            token = next(script, known.ends[0])
            if token in cursor.never and spec.thinking is not None:
                script = iter(spec.thinking.closing)
                token = next(script)
            allowed = [token]
        if known.ends[0] in allowed and (len(allowed) == 1 or draw.random() < 0.5):
            return ids
        others = [token for token in allowed if token != known.ends[0]]
        closes = closing(one, ids, others) if len(ids) > 60 and draw.random() < 0.7 else None
        ids.append(likely(one, others, draw, len(ids)) if closes is None else closes)
        cursor.advance(ids[-1])
    raise AssertionError(one.tokenizer.decode(ids, skip_special_tokens=False))


def closing(one: Family, ids: list[int], allowed: list[int]) -> int | None:
    """The token that goes on with what ends a text, where that is text itself."""
    text = one.tokenizer.decode(ids[-20:], skip_special_tokens=False)
    for end in TEXT_ENDS.get(one.name, ()):
        begun = next(length for length in range(len(end) - 1, -1, -1) if text.endswith(end[:length]))
        left = end[begun:].encode()
        fitting = [token for token in allowed if (part := one.tokenizer.token_bytes(token)) and left.startswith(part)]
        if fitting:
            return max(fitting, key=lambda token: len(one.tokenizer.token_bytes(token)))
    return None


def read(one: Family, answer: Answer, ids: list[int]) -> tuple[Shown, list[tuple[str, Any]]]:
    """What is shown of an answer, token by token, and its calls."""
    text = OutputText(one.tokenizer, SamplingParams(), [], answer)
    content, reasoning, calls = "", "", []
    for token in [*ids, None]:
        if token is None:
            text.finish()
        else:
            text.push(token)
        shown = text.take()
        content, reasoning = content + shown.content, reasoning + shown.reasoning
        for part in shown.calls:
            if part.name is not None:
                calls.append([part.name, ""])
            calls[part.index][1] += part.arguments
    return Shown(content, reasoning), [(name, json.loads(arguments)) for name, arguments in calls]


def delimiters_of_reasoning(name: str, tokens: bool) -> list[str]:
    """What opens and ends it, as text."""
    guidance = asked(name, tokens, ToolUse(), thinking_budget=1).guidance
    assert guidance is not None and guidance.thinking is not None
    decode = family(name, tokens=tokens).tokenizer.decode
    return [
        "".join(part if isinstance(part, str) else decode([part], skip_special_tokens=False) for part in marker)
        for marker in (guidance.thinking.begin, guidance.thinking.end)
    ]


def check_calls(calls: list[tuple[str, Any]]) -> None:
    for name, arguments in calls:
        jsonschema.validate(arguments, PARAMETERS[name])


def using(choice: Any, **options: Any) -> ToolUse:
    return ToolUse(tools=tuple(TOOLS), choice=choice, **options)


@names
@either
def test_required_calls_are_calls_and_nothing_else(name: str, tokens: bool) -> None:
    one = family(name, tokens=tokens)
    for seed, (use, most) in enumerate(
        [
            (using("required"), 128),
            (using("required", parallel=False), 1),
            (using("required", named=frozenset({"now"}), parallel=False), 1),
        ]
    ):
        answer = asked(name, tokens, use)
        shown, calls = read(one, answer, written(name, tokens, answer, seed))
        assert 1 <= len(calls) <= most
        assert not shown.content
        check_calls(calls)
        assert use.named is None or calls == [("now", {})]


@names
@either
def test_required_calls_that_are_cut_off_anywhere_have_no_content(name: str, tokens: bool) -> None:
    one, answer = family(name, tokens=tokens), asked(name, tokens, using("required"))
    ids = written(name, tokens, answer, 0)
    for length in range(min(len(ids), 120)):
        text = OutputText(one.tokenizer, SamplingParams(), [], answer)
        for token in ids[:length]:
            text.push(token)
        text.finish()
        assert not text.take().content or one.tokenizer.decode(ids[:length]).endswith("\ufffd"), "within a letter"


@names
@either
def test_an_answer_of_a_structure_may_be_calls_instead(name: str, tokens: bool) -> None:
    one = family(name, tokens=tokens)
    answer = asked(name, tokens, using("auto"), structure=STRUCTURE)
    seen: set[bool] = set()
    for seed in range(60):
        if len(seen) == 2:
            return
        shown, calls = read(one, answer, written(name, tokens, answer, seed))
        check_calls(calls)
        seen.add(bool(calls))
        if not calls:
            jsonschema.validate(json.loads(shown.content), POINT)
    raise AssertionError(f"whether it calls: {seen}")


@names
@either
def test_a_call_that_a_model_begins_by_itself_is_kept_to_its_schema(name: str, tokens: bool) -> None:
    one = family(name, tokens=tokens)
    answer = asked(name, tokens, using("auto"))
    assert one.form.calls is not None
    only_first = any(section.only_first for section in one.form.calls.sections)
    before = "" if only_first else "Let me see. "
    call = one.turn(before, [("run_in", {"count": 3})])
    for seed in range(3):
        shown, calls = read(one, answer, written(name, tokens, answer, seed, free=call))
        assert shown.content.strip() == before.strip()
        assert calls
        check_calls(calls)
    ids = written(name, tokens, answer, 0, free="Nothing to call [here] {or} there.")
    shown, calls = read(one, answer, ids)
    assert (shown.content, calls) == ("Nothing to call [here] {or} there.", [])


@pytest.mark.parametrize("name", sorted(REASONING_OF))
@either
def test_thinking_comes_before_what_is_constrained(name: str, tokens: bool) -> None:
    one = family(name, tokens=tokens)
    begin, end = delimiters_of_reasoning(name, tokens)
    for use, structure in ((using("required"), None), (ToolUse(), STRUCTURE)):
        answer = asked(name, tokens, use, prompt=f"Hello{begin}", structure=structure)
        assert answer.in_reasoning
        shown, calls = read(one, answer, written(name, tokens, answer, 1, free=f"{THOUGHT}{end}"))
        assert shown.reasoning == THOUGHT
        check_calls(calls)
        if structure is not None:
            jsonschema.validate(json.loads(shown.content), POINT)
        else:
            assert calls and not shown.content


@pytest.mark.parametrize("name", sorted(REASONING_OF))
@pytest.mark.parametrize("budget", [0, 1, 3])
def test_a_budget_ends_thinking_and_its_end_is_no_content(name: str, budget: int) -> None:
    one = family(name)
    begin, _ = delimiters_of_reasoning(name, True)
    answer = asked(name, True, ToolUse(), prompt=begin, structure=STRUCTURE, thinking_budget=budget)
    ids = written(name, True, answer, 2, free="a b c d e f g")
    shown, _ = read(one, answer, ids)
    thought = one.tokenizer.encode(shown.reasoning, add_special_tokens=False)
    assert len(thought) == budget
    jsonschema.validate(json.loads(shown.content), POINT)
