"""Chat templates as models bring them (llama.cpp collects them), against transformers' own rendering."""

import contextlib
import threading
from pathlib import Path
from typing import Any

import pytest
from quire_engine.errors import InvalidParameter, ModelError
from quire_engine.text import chat_template
from quire_engine.text.chat_template import ChatTemplate
from quire_engine.text.images import PromptImage
from templates import SPECIAL, TEMPLATES, read, transformers_tokenizer
from transformers import PreTrainedTokenizerFast

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "First question"},
    {"role": "assistant", "content": "An answer", "reasoning_content": "Some thought"},
    {"role": "user", "content": " Second question\n"},
]
CALLS = [{"role": "user", "content": "What is the weather?"}]


def ours(template: ChatTemplate, messages: list[dict[str, Any]], *, opening: bool = True, **variables: Any) -> str:
    return template.render(
        messages, add_generation_prompt=opening, continue_final_message=not opening, variables=variables
    )


@pytest.fixture(scope="module")
def backend() -> PreTrainedTokenizerFast:
    return transformers_tokenizer()


def test_there_are_templates() -> None:
    assert len(TEMPLATES) >= 60


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_equal_to_transformers(path: Path, backend: PreTrainedTokenizerFast) -> None:
    """Conversations with and without a system prompt and an earlier answer, begun and continued."""
    template = read(path)
    conversations = (TURNS, TURNS[1:], TURNS[1:2], TURNS[:2], TURNS[:3], TURNS[1:3])
    rendered = 0
    for messages in conversations:
        for opening in (True, False):
            try:
                expected = backend.apply_chat_template(
                    messages,
                    chat_template=path.read_text(),
                    tokenize=False,
                    add_generation_prompt=opening,
                    continue_final_message=not opening,
                )
            except Exception:  # the template's, or what transformers makes of it
                with pytest.raises(InvalidParameter):
                    ours(template, messages, opening=opening)
                continue
            assert ours(template, messages, opening=opening) == expected
            rendered += 1
    if not rendered:
        pytest.skip("it takes conversations with tools alone")


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_texts_and_parts_are_the_same_to_every_template(path: Path) -> None:
    template = read(path)
    text = [{"role": "user", "content": "One question"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "One question"}]}]
    several = [{"role": "user", "content": [{"type": "text", "text": word} for word in ("First", "Second")]}]
    try:
        expected = ours(template, text)
    except InvalidParameter:
        pytest.skip("it takes conversations with tools alone")
    assert expected == ours(template, parts)
    both = ours(template, several)
    assert "First" in both.partition("Second")[0], "their order is kept"
    assert "'type'" not in both and '"type"' not in both and "{'" not in both


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_an_answer_of_calls_alone_may_have_null_for_content(path: Path) -> None:
    template = read(path)
    arguments: Any
    for arguments in ({"city": "X"}, '{"city": "X"}'):  # templates want one or the other
        function = {"name": "weather", "arguments": arguments}
        turn = {"role": "assistant", "tool_calls": [{"id": "abcdefghi", "type": "function", "function": function}]}
        try:
            with_text, rendered = (
                ours(template, [*CALLS, turn | {"content": content}, *TURNS[3:]]) for content in ("Let me see.", None)
            )
            break
        except InvalidParameter as error:
            assert "content" not in str(error)
    else:
        pytest.skip("it does not take such turns at all")
    assert "None" not in rendered.replace("None", "", with_text.count("None"))
    if with_text.count("weather") > 1:
        assert rendered.count("weather") == with_text.count("weather"), "the call is lost"


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_the_developer_is_the_system_where_a_template_has_no_such_role(path: Path) -> None:
    template = read(path)
    try:
        system = ours(template, TURNS[:2])
    except InvalidParameter:
        pytest.skip("it has no place for a system prompt")
    developer = ours(template, [TURNS[0] | {"role": "developer"}, TURNS[1]])
    assert "Be brief." in developer or "Be brief." not in system
    assert developer == system or "developer" in path.read_text()


def test_parts_for_templates_that_know_only_parts() -> None:
    loops = "{% for m in messages %}{% for part in m.content %}[{{ part['text'] }}]{% endfor %}{% endfor %}"
    indexes = "{{ messages[0]['content'][0]['text'] }}"
    for source, expected in ((loops, "[hello]"), (indexes, "hello")):
        assert ours(ChatTemplate(source, {}), [{"role": "user", "content": "hello"}]) == expected
    assert ours(ChatTemplate(loops, {}), [{"role": "assistant", "content": None}]) == ""


def test_an_image_at_the_end_is_not_continued() -> None:
    image = {"type": "image", "image": PromptImage(what="image", key=b"", replacement="", num_tokens=1)}
    content = [{"type": "text", "text": "It shows "}, image]
    template = ChatTemplate("{% for part in messages[0].content %}{{ part.type }}{% endfor %}", {})
    with pytest.raises(InvalidParameter, match="ends with a text"):
        ours(template, [{"role": "user", "content": content}], opening=False)


@pytest.mark.parametrize(
    "name",
    ["messages", "tools", "add_generation_prompt", "chat_template", "tokenize", "bos_token", "range", "namespace"],
)
def test_what_is_not_the_callers_is_refused_by_name(name: str) -> None:
    template = ChatTemplate("{{ messages }}{{ bos_token }}{{ range(2) }}{{ tokenize }}{{ chat_template }}", SPECIAL)
    with pytest.raises(InvalidParameter, match=f"holds {name}") as refused:
        template.render(TURNS, add_generation_prompt=True, continue_final_message=False, variables={name: "x"})
    assert refused.value.parameter == "chat_template_kwargs"


def test_variables_that_the_template_reads_pass() -> None:
    source = "{% if day is not defined %}{% set day = 'Monday' %}{% endif %}{{ day }}{{ ' thinks' if thinking }}"
    template = ChatTemplate(source, {})
    assert template.variables == {"day", "thinking"}
    assert ours(template, TURNS) == "Monday"
    assert ours(template, TURNS, day="Sunday", thinking=True) == "Sunday thinks"
    for unknown in ("padding", "return_tensors", "conversation", "self", "x" * 1000):
        with pytest.raises(InvalidParameter, match="does not read") as refused:
            template.render(TURNS, add_generation_prompt=True, continue_final_message=False, variables={unknown: 1})
        assert len(str(refused.value)) < 300


ENDLESS = {
    "a macro": "{% macro all() %}{% for m in messages %}{% for n in messages %}{% for o in messages %}{{ m.role }}"
    "{% endfor %}{% endfor %}{% endfor %}{% endmacro %}{{ all() }}",
    "a block": "{% set x %}{% for m in messages %}{% for n in messages %}{% for o in messages %}{{ m['role'] }}"
    "{% endfor %}{% endfor %}{% endfor %}{% endset %}",
    "silence": "{% for m in messages %}{% for n in messages %}{% for o in messages %}{% if m.get('x') %}{% endif %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "text": "{% for m in messages %}{% for n in messages %}{% for o in messages %}y"
    "{% endfor %}{% endfor %}{% endfor %}",
}


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_rendering_ends(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """10^12 turns of a loop; without a limit the test would never end."""
    monkeypatch.setattr(chat_template, "RENDER_SECONDS", 0.2)
    with pytest.raises(InvalidParameter, match="send fewer"):
        ours(ChatTemplate(source, {}), TURNS[1:2] * 10_000)


def test_what_is_rendered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDERED", 100_000)
    source = "{% for m in messages %}{% for n in messages %}{{ n.content }}{% endfor %}{% endfor %}"
    assert len(ours(ChatTemplate(source, {}), TURNS[1:2] * 10)) == 1400
    with pytest.raises(InvalidParameter, match="more than 100000 characters"):
        ours(ChatTemplate(source, {}), TURNS[1:2] * 1000)


def test_threads_do_not_share_a_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate(ENDLESS["text"], {})
    monkeypatch.setattr(chat_template, "RENDER_SECONDS", 1.0)
    failed = threading.Event()

    def endless() -> None:
        with pytest.raises(InvalidParameter):
            ours(template, TURNS[1:2] * 10_000)
        failed.set()

    thread = threading.Thread(target=endless)
    thread.start()
    assert ours(template, TURNS[1:2] * 3) == "y" * 27
    thread.join()
    assert failed.is_set()


@pytest.mark.parametrize("source", ["{% for x in %}", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", 5])
def test_a_broken_template_is_said_at_the_start(source: Any) -> None:
    with pytest.raises(ModelError, match=r"not valid Jinja.*--chat-template"):
        ChatTemplate(source, {})


def test_templates_cannot_reach_into_the_interpreter() -> None:
    for source in (
        "{{ ''.__class__.__mro__ }}",
        "{{ dict.__init__ }}",
        "{% set n = namespace(__class__=1) %}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__ }}",
    ):
        with contextlib.suppress(InvalidParameter):
            assert ours(ChatTemplate(source, {}), TURNS) == ""
