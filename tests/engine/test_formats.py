"""What models write, read back: against what was rendered, however it is cut, and where others are known to fail."""

from functools import cache
from typing import Any

import pytest
from call_formats import ARGUMENTS, NAMES, TOOLS, calls_of, family, parse, text_of
from hypothesis import given, settings
from hypothesis import strategies as st

names = pytest.mark.parametrize("name", NAMES)
tokens_or_text = pytest.mark.parametrize("tokens", [True, False], ids=["tokens", "text"])


@names
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=range(len(ARGUMENTS)))
@tokens_or_text
def test_calls_are_read_as_they_were_rendered(name: str, arguments: dict[str, Any], tokens: bool) -> None:
    one = family(name, tokens=tokens)
    calls = [("run_in_terminal", arguments), ("run_in", arguments), ("now", {})]
    for count in (0, 1, 3):
        for content in ("", "Let me see."):
            if content and count and any(section.only_first for section in one.form.calls.sections):
                continue  # such a call is one only where content begins
            pieces = one.read(one.turn(content, calls[:count]))
            assert calls_of(pieces) == calls[:count]
            assert text_of(pieces, "content") == content
            assert text_of(pieces, "reasoning") == ""


@cache
def fragments(name: str, tokens: bool) -> list[str]:
    """What a text of a family may be made of."""
    one = family(name, tokens=tokens)
    turn = one.turn("Hi", [("run_in", {"text": 'a "b"', "count": 1}), ("now", {})])
    marks = list(one.form.marks.values())
    words = [
        "run_in",
        "run_in_terminal",
        "now",
        "nobody",
        '{"text": "',
        '"',
        "}",
        "{",
        "[",
        "]",
        "\\",
        "\n",
        " ",
        "é🌍",
    ]
    reasoning = one.form.reasoning
    plain = [p.text for p in (reasoning.begin + reasoning.end if reasoning else ()) if hasattr(p, "text")]
    chunks = one.marked(one.tokenizer.encode(turn, add_special_tokens=False))
    parts = ["".join(chunks[place : place + 5]) for place in range(0, len(chunks), 5)]
    return [*marks, *words, *plain, *parts, "".join(chunks), "null", "1", "<", ", "]


@names
@tokens_or_text
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_how_a_text_is_cut_makes_no_difference(name: str, tokens: bool, data: st.DataObject) -> None:
    pieces = st.one_of(st.sampled_from(fragments(name, tokens)), st.text(max_size=3))
    text = "".join(data.draw(st.lists(pieces, max_size=20)))
    in_reasoning, tools = data.draw(st.booleans()), data.draw(st.sampled_from([TOOLS, []]))
    form = family(name, tokens=tokens).form
    whole = parse(form, [text], tools, in_reasoning)
    assert parse(form, list(text), tools, in_reasoning) == whole
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parse(form, chunks, tools, in_reasoning) == whole
    assert all(letter < "\ud800" or letter > "\udfff" for piece in whole for letter in piece.text)
    assert {piece.text for piece in whole if piece.kind == "call"} <= {tool.name for tool in tools}


@names
@tokens_or_text
def test_a_call_that_breaks_off_has_been_told_as_far_as_it_came(name: str, tokens: bool) -> None:
    one = family(name, tokens=tokens)
    text = "".join(one.marked(one.tokenizer.encode(one.turn("", [("run_in", ARGUMENTS[2])]), add_special_tokens=False)))
    whole = text_of(parse(one.form, [text], TOOLS, False), "arguments")
    for end in range(len(text)):
        pieces = parse(one.form, [text[:end]], TOOLS, False)
        assert whole.startswith(text_of(pieces, "arguments"))
        if any(piece.kind == "call" for piece in pieces):
            assert text_of(pieces, "content") == ""


@names
def test_a_name_that_is_no_tools_is_content(name: str) -> None:
    one = family(name)
    for unknown in ("run", "run_i", "run_in_", "run_in_terminal2", "Now"):
        pieces = one.read(one.turn("", [(unknown, {"text": "x"})]))
        assert calls_of(pieces) == []
        assert unknown in text_of(pieces, "content")
