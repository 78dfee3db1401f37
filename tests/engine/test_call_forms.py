"""Calls that a model begins by itself, in any form of its family: not only in the one in which it is made to call."""

import pytest
from call_formats import NAMES, family
from quire_engine.guidance.compiled import Guide
from quire_engine.guidance.cursor import Cursor
from test_answers import asked, check_calls, delimiters_of_reasoning, either, read, using, vocabulary, written

FORMS = [  # a family, content, and how a call begins after it
    ("llama3_json", "", '{"name": "run_in"'),
    ("llama3_json", "", "<|python_tag|>"),
    ("llama3_json", "Let me see. ", "<|python_tag|>"),
    ("pythonic", "", "<|python_start|>["),
    ("pythonic", "Let me see. ", "<|python_start|>["),
    ("granite", "Let me see. ", "<|tool_call|>["),
    ("granite", "Let me see. ", "<tool_call>["),
    ("phi4_mini_json", "Let me see. ", "functools["),
    ("qwen3_coder", "Let me see.\n", "<function="),
    ("qwen3_coder", "Let me see.\n", "<tool_call>"),
    ("mistral", "Let me see. ", "[TOOL_CALLS]"),
    ("openai", "Let me see. ", "<|channel|>commentary to=functions."),
    ("openai", "Let me see. ", "<|channel|>analysis to=functions."),
    ("openai", "Let me see. ", "<|start|>assistant to=functions."),
    ("openai", "", "to=functions.run_in<|channel|>"),
    ("openai", "", " to=functions.now<|channel|>"),
]
forms = pytest.mark.parametrize(("name", "content", "begun"), FORMS)


@forms
@either
@pytest.mark.parametrize("parallel", [True, False])
def test_a_call_in_any_form_is_kept_to_its_schema(
    name: str, content: str, begun: str, tokens: bool, parallel: bool
) -> None:
    one, answer = family(name, tokens=tokens), asked(name, tokens, using("auto", parallel=parallel))
    for seed in range(4):
        ids = written(name, tokens, answer, seed, free=content + begun)
        shown, calls = read(one, answer, ids)
        assert shown.content.strip() == content.strip(), one.tokenizer.decode(ids)
        assert not shown.reasoning
        assert len(calls) >= 1 if parallel else len(calls) == 1
        check_calls(calls)


@either
@pytest.mark.parametrize("name", NAMES)
def test_forms_that_can_be_told_apart_are_sections_of_their_own(name: str, tokens: bool) -> None:
    guidance = asked(name, tokens, using("auto")).guidance
    assert guidance is not None
    count = {"llama3_json": 2, "pythonic": 2, "granite": 2, "phi4_mini_json": 2, "qwen3_coder": 2, "openai": 3}
    assert len(guidance.sections) == count.get(name, 1)
    assert [section.only_first for section in guidance.sections] == {
        "llama3_json": [True, False],
        "pythonic": [True, False],
        "openai": [False, False, True],
    }.get(name, [False] * len(guidance.sections))


@either
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("phi4_mini_json", "functools is a module; functools.wraps (see [it]) is of use."),
        ("llama3_json", 'So: {"name": "run_in", "parameters": {"count": "x"}}'),
        ("llama3_json", '{"name": "somebody"}'),
        ("pythonic", "So: [run_in(1)]"),
        ("qwen3_coder", "<functions> and <function>"),
        ("openai", "It goes to=functions.run_in"),
    ],
)
def test_what_only_looks_like_a_call_is_content(name: str, content: str, tokens: bool) -> None:
    answer = asked(name, tokens, using("auto"))
    shown, calls = read(family(name, tokens=tokens), answer, written(name, tokens, answer, 0, free=content))
    assert (shown.content, calls) == (content, [])


@either
@pytest.mark.parametrize(
    ("name", "thought", "counts"),
    [
        ("qwen3_coder", "Shall I <function=run_in>, or not?", False),
        ("openai", "Shall I to=functions.run_in, or not?", False),
        ("openai", "I shall.<|channel|>analysis to=functions.", True),
        ("openai", "I shall.<|start|>assistant to=functions.", True),
    ],
)
def test_in_reasoning_only_tokens_begin_calls(name: str, thought: str, counts: bool, tokens: bool) -> None:
    one, (begin, end) = family(name, tokens=tokens), delimiters_of_reasoning(name, tokens)
    answer = asked(name, tokens, using("auto"), prompt=f"Hello{begin}")
    for seed in range(3):
        free = thought if counts and tokens else f"{thought}{end}Done."
        shown, calls = read(one, answer, written(name, tokens, answer, seed, free=free))
        check_calls(calls)
        if counts and tokens:
            assert (shown.reasoning, shown.content) == ("I shall.", "")
            assert calls
        else:
            assert (shown.reasoning, shown.content, calls) == (thought, "Done.", [])


def test_calls_of_several_forms_follow_one_another() -> None:
    """Each masked from where it begins, also one that counts only where content begins: it does after a call."""
    one, answer = family("openai"), asked("openai", True, using("auto"))
    rest = "<|channel|>commentary <|constrain|>json<|message|>{}<|call|>"
    turns = [
        f" to=functions.now{rest}",
        f" to=functions.now{rest}",
        f"<|start|>assistant to=functions.now{rest}",
        "<|start|>assistant<|channel|>analysis to=functions.now <|constrain|>json<|message|>{}<|call|>",
    ]
    ids = one.tokenizer.encode("".join(turns), add_special_tokens=False)
    assert read(one, answer, ids)[1] == [("now", {})] * 4
    assert answer.guidance is not None
    cursor, masked = Cursor(Guide(answer.guidance, vocabulary("openai", True))), []
    message = one.tokenizer.delimiters["<|message|>"]
    for token in ids:
        if token == message:
            masked.append(cursor.matcher is not None)
        cursor.advance(token)
    assert masked == [True] * 4
    assert cursor.matcher is None
