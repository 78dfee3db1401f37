"""What models write, read back: against what was rendered, however it is cut, and where others are known to fail."""

from functools import cache
from typing import Any

import pytest
from call_formats import ARGUMENTS, NAMES, TOOLS, calls_of, family, parse, text_of
from hypothesis import given, settings
from hypothesis import strategies as st
from quire_engine.text.formats.bind import begins_in_reasoning
from quire_engine.text.formats.parser import OutputParser, Piece

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


@pytest.mark.parametrize(
    ("name", "opener"),
    [("hermes", "<tool_call>"), ("qwen3_coder", "<tool_call>\n<fun"), ("kimi_k2", "<|tool_calls_section_begin|>")],
)
@tokens_or_text
def test_a_call_that_breaks_off_before_its_name_is_no_content(name: str, opener: str, tokens: bool) -> None:
    one = family(name, tokens=tokens)
    text = one.turn("Let me see.", [("run_in", {})])
    begun, named = (one.tokenizer.encode(text[: text.index(part) + len(part)]) for part in (opener, "run_in"))
    chunks = one.marked(named)
    for end in range(len(begun), len(named)):
        pieces = parse(one.form, chunks[:end], TOOLS, False)
        assert text_of(pieces, "content").strip() == "Let me see."
    assert text_of(one.read("Let me see. A < b"), "content") == "Let me see. A < b"


@names
def test_a_name_that_is_no_tools_is_content(name: str) -> None:
    one = family(name)
    for unknown in ("run", "run_i", "run_in_", "run_in_terminal2", "Now"):
        pieces = one.read(one.turn("", [(unknown, {"text": "x"})]))
        assert calls_of(pieces) == []
        assert unknown in text_of(pieces, "content")


def test_two_calls_in_one_chunk_keep_their_arguments() -> None:
    one = family("hermes")
    calls = [("run_in", {"text": "a"}), ("run_in_terminal", {"text": "b"})]
    text = "".join(one.marked(one.tokenizer.encode(one.turn("", calls), add_special_tokens=False)))
    parser = OutputParser(one.form, TOOLS, in_reasoning=False)
    assert calls_of(parser.push(text)) == calls
    assert parser.finish() == []


@names
def test_a_call_without_arguments_has_an_empty_object_and_keeps_what_follows(name: str) -> None:
    calls = [("now", {}), ("run_in", {"text": "x"})]
    assert calls_of(family(name).read(family(name).turn("", calls))) == calls


@names
def test_a_name_is_told_whole_though_another_tools_name_begins_it(name: str) -> None:
    one = family(name)
    ids = one.tokenizer.encode(one.turn("", [("run_in_terminal", {})]), add_special_tokens=False)
    pieces = parse(one.form, [letter for chunk in one.marked(ids) for letter in chunk], TOOLS, False)
    assert [piece.text for piece in pieces if piece.kind == "call"] == ["run_in_terminal"]


def test_values_between_tags_have_the_types_of_the_schema() -> None:
    def arguments(values: dict[str, str]) -> Any:
        pairs = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
        text = f"<tool_call>\n<function=run_in>\n{pairs}</function>\n</tool_call>"
        return calls_of(family("qwen3_coder").read(text))[0][1]

    found = arguments({"text": "5", "count": "5", "ratio": "5", "flag": "True", "maybe": "null", "tags": '["5"]'})
    assert found == {"text": "5", "count": 5, "ratio": 5, "flag": True, "maybe": None, "tags": ["5"]}
    assert [type(found[key]) for key in ("text", "count", "ratio")] == [str, int, int]
    assert arguments({"count": "many", "maybe": "nul", "other": "1", "text": "null"}) == {
        "count": "many",
        "maybe": "nul",
        "other": 1,
        "text": "null",
    }


@pytest.mark.parametrize("name", ["hermes", "qwen3_coder", "glm45", "pythonic", "gemma4"])
def test_a_long_string_is_told_as_it_comes(name: str) -> None:
    one = family(name)
    chunks = one.marked(one.tokenizer.encode(one.turn("", [("run_in", {"text": "ab" * 50})]), add_special_tokens=False))
    parser = OutputParser(one.form, TOOLS, in_reasoning=False)
    told = [sum(piece.kind == "arguments" for piece in parser.push(chunk)) for chunk in chunks]
    assert sum(told) > 40


def test_a_call_within_reasoning_ends_it_where_its_opener_is_a_token() -> None:
    turn = "thinking\n" + family("hermes").turn("", [("run_in", {})])
    pieces = family("hermes").read(turn, in_reasoning=True)
    assert [piece.kind for piece in pieces] == ["reasoning", "call", "arguments"]
    assert text_of(pieces, "reasoning") == "thinking"
    assert text_of(family("hermes", tokens=False).read(turn, in_reasoning=True), "reasoning") == turn


@pytest.mark.parametrize("tokens", [True, False])
def test_only_the_prompts_end_tells_whether_reasoning_follows(tokens: bool) -> None:
    one = family("hermes", tokens=tokens)

    def follows(prompt: str, continued: str | None = None) -> bool:
        ids = one.tokenizer.encode(prompt, add_special_tokens=False)
        return begins_in_reasoning(one.form, ids, one.tokenizer, continued=continued)

    assert follows("user: hi\nassistant: <think>\n")
    assert follows("<think>old</think> answer\nassistant: <think>")
    assert not follows("<think>old</think> answer\nassistant: ")
    assert not follows("assistant: <think>\n\n</think>\n\n")
    assert not follows("what does <think> mean?\nassistant: ")
    assert follows("assistant: <think>\nso far", "so far")
    assert follows("assistant: <think>so far", "<think>so far")
    assert not follows("assistant: <think>so</think> far", "<think>so</think> far")
    assert not follows("assistant: so far", "so far")


@names
def test_delimiters_are_never_content(name: str) -> None:
    one = family(name)
    for mark in one.form.marks.values():
        pieces = parse(one.form, ["before", mark, "after"], TOOLS, False)
        assert "".join(piece.text for piece in pieces) == "beforeafter"


def test_a_reasoning_end_without_an_opener_is_left_out() -> None:
    assert family("hermes").read("</think>\n\nHello</think> you") == [Piece("content", "Hello you")]
    assert family("hermes", tokens=False).read("</think>Hello") == [Piece("content", "Hello")]


def test_text_that_spells_a_delimiter_is_content_where_the_delimiter_is_a_token() -> None:
    one = family("hermes")
    text = 'Write <tool_call>{"name": "now", "arguments": {}}</tool_call> or </think>.'
    assert parse(one.form, [text], TOOLS, False) == [Piece("content", text)]


def test_forced_tokens_that_end_reasoning_are_read_like_drawn_ones() -> None:
    one = family("hermes")
    pieces = one.read("Considering the limited time, I answer now.\n</think>\n\nYes", in_reasoning=True)
    assert pieces[-1] == Piece("content", "Yes")
    assert "</think>" not in text_of(pieces, "reasoning")


def test_without_tools_calls_are_not_looked_for() -> None:
    turn = family("hermes", tokens=False).turn("Hi", [("run_in", {})])
    assert family("hermes", tokens=False).read(turn, []) == [Piece("content", turn)]


def test_gpt_oss_names_the_recipient_in_either_place() -> None:
    one = family("openai")
    text = (
        "<|channel|>analysis<|message|>think<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        '<|start|>assistant<|channel|>commentary to=functions.run_in <|constrain|>json<|message|>{"text": "a"}<|call|>'
        '<|start|>assistant to=functions.run_in<|channel|>commentary json<|message|>{"text": "b"}<|call|>'
        "<|start|>assistant<|channel|>final<|message|>Done.<|return|>"
    )
    pieces = one.read(text)
    assert calls_of(pieces) == [("run_in", {"text": "a"}), ("run_in", {"text": "b"})]
    assert (text_of(pieces, "reasoning"), text_of(pieces, "content")) == ("think", "I look.Done.")
    for kind in ("code", "<|constrain|>code", ""):
        assert calls_of(one.read(text.replace("commentary json", f"commentary {kind}"))) == calls_of(pieces)
    first = ' to=functions.run_in<|channel|>commentary <|constrain|>json<|message|>{"text": "a"}'
    assert calls_of(one.read(first)) == [("run_in", {"text": "a"})]


def test_mistrals_older_models_write_a_list() -> None:
    first, second = (
        '{"name": "run_in", "arguments": {"text": "a"}, "id": "abcdefghi"}',
        '{"name": "now", "arguments": {}}',
    )
    text = f"[TOOL_CALLS] [{first}, {second}]"
    assert calls_of(family("mistral").read(text)) == [("run_in", {"text": "a"}), ("now", {})]
    text = '[TOOL_CALLS]run_in[CALL_ID]abcdefghi[ARGS]{"text": "a"}'
    assert calls_of(family("mistral").read(text)) == [("run_in", {"text": "a"})]


def test_reasoning_in_plain_words_counts_only_where_the_output_begins() -> None:
    text = "Here is my thought process: I see.\n\nHere is my response: Hi. Here is my response: no."
    pieces = family("granite").read(text)
    assert text_of(pieces, "reasoning") == "I see."
    assert text_of(pieces, "content") == "Hi. Here is my response: no."


def test_wrappers_of_content_are_left_out() -> None:
    pieces = family("cohere").read("<|START_THINKING|>hm<|END_THINKING|><|START_RESPONSE|>Hi<|END_RESPONSE|>")
    assert pieces == [Piece("reasoning", "hm"), Piece("content", "Hi")]
