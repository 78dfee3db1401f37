"""Conversations with tools in the chat templates of many models, against transformers' rendering of the form that each
model was trained on."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_cpp import HOME
from openai.types.chat import ChatCompletionMessage
from quire_engine.errors import InvalidParameter
from quire_engine.text.chat_template import ChatTemplate
from quire_engine.text.messages import MAX_CALLS
from quire_engine.text.tokenizer import Tokenizer
from templates import SPECIAL, TEMPLATES, read, transformers_tokenizer

CITY = {"type": "string", "description": "Its name"}
PARAMETERS = {"type": "object", "properties": {"city": CITY}, "required": ["city"]}
FUNCTION = {"name": "weather", "description": "Tells the weather.", "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": FUNCTION}]
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "How is it in Ulm?"}
IDS = ("call_0123456789abcdefghijABCD", "call_abcdefghij0123456789ABCD")
CITIES = ("Ulm", "Bonn")
RESULTS = ("Rain", "Sun")
CHATML = (  # SmolLM2's
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
    "are helpful<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OWN_WAY = "fireworks-ai-llama-3-firefunction-v2"  # its tools come by another name, and it refuses to go without
RENDERED = [path for path in TEMPLATES if path.stem != OWN_WAY]
WITHOUT_TOOLS = {
    OWN_WAY,
    "HuggingFaceTB-SmolLM3-3B",  # other names too
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
    "deepseek-ai-DeepSeek-V3.1",
    "google-gemma-2-2b-it",
    "llama-cpp-deepseek-r1",  # transformers refuses what it does with them
    "llama-cpp-rwkv-world",
    "microsoft-Phi-3.5-mini-instruct",
}
ALTERNATING = (  # user and assistant in turn, and no system prompt
    "{% for message in messages %}{% if message.role != ('user', 'assistant')[loop.index0 % 2] %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ message.role }}]{{ message.content }}\n{% endfor %}"
)


def model(name: str) -> Path:
    return HOME / f"models/templates/{name}.jinja"


def call(number: int, arguments: Any = None, **changes: Any) -> dict[str, Any]:
    """As OpenAI's API has it; transformers' templates take other `arguments`."""
    text = json.dumps({"city": CITIES[number]}, ensure_ascii=False) if arguments is None else arguments
    return {"id": IDS[number], "type": "function", "function": {"name": "weather", "arguments": text}} | changes


def calling(*calls: Any, **changes: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(calls)} | changes


def result(number: int, **changes: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": IDS[number], "content": RESULTS[number]} | changes


def as_objects(number: int, **changes: Any) -> dict[str, Any]:
    return call(number, {"city": CITIES[number]}, **changes)


def ours(
    template: ChatTemplate,
    messages: list[Any],
    tools: list[dict[str, Any]] | None = TOOLS,
    *,
    continued: bool = False,
    **variables: Any,
) -> str:
    return template.render(
        messages,
        add_generation_prompt=not continued,
        continue_final_message=continued,
        variables=variables,
        tools=tools,
    )


def theirs(source: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = TOOLS) -> str:
    rendered = transformers_tokenizer().apply_chat_template(
        messages, tools=tools, chat_template=source, tokenize=False, add_generation_prompt=True
    )
    assert isinstance(rendered, str)
    return rendered


@pytest.mark.parametrize(
    "name",
    [
        "Qwen-Qwen2.5-7B-Instruct",
        "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
        "CohereForAI-c4ai-command-r-plus-tool_use",
        "CohereForAI-c4ai-command-r7b-12-2024-tool_use",
        "GLM-4.6",
        "Qwen3-Coder",
        "MiniMax-M2",
        "moonshotai-Kimi-K2",
        "deepseek-ai-DeepSeek-V3.2",
        "ibm-granite-granite-4.0",
    ],
)
def test_arguments_are_objects_where_the_template_writes_json_or_pairs(name: str) -> None:
    source = model(name).read_text()
    expected = theirs(
        source,
        [
            USER,
            calling(as_objects(0), as_objects(1)),
            result(0, name="weather"),
            result(1, name="weather"),
        ],
    )
    given = [USER, calling(call(0), call(1)), result(0), result(1)]
    assert ours(read(model(name)), given) == expected
    assert all(text in expected for text in RESULTS)


def test_arguments_are_texts_where_the_template_concatenates_them() -> None:
    """As they were sent, to the space."""
    name = "meetkai-functionary-medium-v3.2"
    sent = '{ "city":"Ulm" }'
    messages = [USER, calling(call(0, sent)), result(0, name="weather")]
    expected = theirs(model(name).read_text(), messages)
    assert ours(read(model(name)), [*messages[:2], result(0)]) == expected
    assert sent in expected


def test_content_before_calls_is_a_turn_of_its_own_where_the_template_would_lose_the_calls() -> None:
    name = "deepseek-ai-DeepSeek-R1-Distill-Llama-8B"  # without tools: it writes calls, but no tools
    rendered = ours(read(model(name)), [USER, calling(call(0), content="Let me see."), result(0)], None)
    assert rendered == (
        "<s><｜User｜>How is it in Ulm?<｜Assistant｜>Let me see.<｜end▁of▁sentence｜>"
        "<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n"
        '```json\n{"city": "Ulm"}\n```<｜tool▁call▁end｜>'
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>Rain<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
    )


@pytest.mark.parametrize("name", ["meta-llama-Llama-3.1-8B-Instruct", "openai-gpt-oss-120b", "GigaChat3-10B-A1.8B"])
def test_parallel_calls_are_turns_of_one_each_where_the_template_takes_one(name: str) -> None:
    one = [calling(as_objects(0)), result(0), calling(as_objects(1)), result(1)]
    expected = theirs(model(name).read_text(), [USER, *one])
    assert ours(read(model(name)), [USER, calling(call(0), call(1)), result(0), result(1)]) == expected
    assert all(text in expected for text in RESULTS)


def test_ids_have_9_letters_and_digits_where_the_template_wants_that() -> None:
    name = "mistralai-Mistral-Nemo-Instruct-2407"
    rendered = ours(read(model(name)), [USER, calling(call(0), call(1)), result(1), result(0)])
    mapped = re.findall(r'"id": "([a-zA-Z0-9]{9})"', rendered)
    assert len(mapped) == len(set(mapped)) == 2
    both = [calling(*(as_objects(number, id=mapped[number]) for number in (0, 1)))]
    behind = [result(number, tool_call_id=mapped[number]) for number in (0, 1)]
    assert rendered == theirs(model(name).read_text(), [USER, *both, *behind])
    own = call(0, id="abcDEF123")
    assert '"id": "abcDEF123"' in ours(read(model(name)), [USER, calling(own), result(0, tool_call_id="abcDEF123")])


def test_ids_stay_the_same_when_the_conversation_goes_on() -> None:
    template = read(model("mistralai-Mistral-Nemo-Instruct-2407"))
    begun = [USER, calling(call(0)), result(0)]
    first = ours(template, begun, None)
    later = ours(template, [*begun, calling(call(1)), result(1)], None)
    assert later.startswith(first.removesuffix("</s>"))


@pytest.mark.parametrize("content", [None, "", []])
@pytest.mark.parametrize("name", ["mistralai-Ministral-3-14B-Reasoning-2512", "Qwen-Qwen3-0.6B"])
def test_calls_without_content_reach_every_template(name: str, content: Any) -> None:
    rendered = ours(read(model(name)), [USER, calling(call(0), content=content), result(0)])
    assert '{"city": "Ulm"}' in rendered and "None" not in rendered


def test_reasoning_content_and_calls_of_one_answer_are_all_kept() -> None:
    answer = calling(call(1), content="Let me see.", reasoning_content="The weather is asked for.")
    for path in RENDERED:
        assert "Bonn" in ours(read(path), [USER, answer, result(1)]), path.stem
    assert "The weather is asked for." in ours(read(model("openai-gpt-oss-120b")), [USER, answer, result(1)])


@pytest.mark.parametrize("path", RENDERED, ids=lambda path: path.stem)
def test_nothing_of_a_conversation_with_calls_is_lost(path: Path) -> None:
    """In any template: neither calls nor results, in their order, and nothing is written as Python or quoted twice."""
    template = read(path)
    messages = [USER, calling(call(0), call(1)), result(1), result(0)]
    for tools in (TOOLS, None):
        if tools is None and "tool_use" in path.stem:
            continue  # there is another template for that
        rendered = ours(template, messages, tools).removeprefix(USER["content"])
        assert "{'city': 'Ulm'" not in rendered and '{\\"city' not in rendered
        places = [rendered.rindex(text) for text in (*CITIES, *RESULTS)]
        assert places[0] < places[1] and places[2] < places[3]


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_every_template_tells_the_model_of_tools_or_is_known_not_to(path: Path) -> None:
    template = read(path)
    assert template.source == path.read_text()
    assert template.knows_tools == (path.stem not in WITHOUT_TOOLS)
    for messages in ([USER], [SYSTEM, USER]) if path in RENDERED else ():
        if messages == [USER] or path.stem != "google-gemma-2-2b-it":  # which refuses system prompts
            rendered = ours(template, messages)
            assert "weather" in rendered and "Tells the weather." in rendered


def test_a_template_without_tools_gets_them_in_words(caplog: pytest.LogCaptureFixture) -> None:
    template = ChatTemplate(CHATML, SPECIAL)
    assert not template.knows_tools
    said = calling(call(0), call(1, '{"city": "\\u0141\\u00f3d\\u017a", "days": 2}'), content="Let me see.")
    messages = [SYSTEM, USER, said, result(1), result(0), {"role": "user", "content": "Thanks"}]
    system, *turns = ours(template, messages).split("<|im_end|>\n")
    assert system.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n")
    assert f"<tools>\n{json.dumps(TOOLS[0])}\n</tools>" in system
    assert '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>' in system
    assert turns == [
        "<|im_start|>user\nHow is it in Ulm?",
        '<|im_start|>assistant\nLet me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n'
        '</tool_call>\n<tool_call>\n{"name": "weather", "arguments": {"city": "Łódź", "days": 2}}\n</tool_call>',
        "<|im_start|>tool\nRain",
        "<|im_start|>tool\nSun",
        "<|im_start|>user\nThanks",
        "<|im_start|>assistant\n",
    ]
    ours(template, messages)
    assert [record.levelname for record in caplog.records].count("WARNING") == 1, "once"
    assert ours(template, [USER]).startswith("<|im_start|>system\n# Tools")
    assert ours(template, [SYSTEM | {"role": "developer"}, USER]) == ours(template, [SYSTEM, USER])


def test_roles_alternate_and_no_system_prompt_is_added_where_the_template_wants_that() -> None:
    template = ChatTemplate(ALTERNATING, SPECIAL)
    thanks = {"role": "user", "content": [{"type": "text", "text": "Thanks"}]}
    messages = [USER, calling(call(0), call(1)), result(0), result(1), thanks]
    rendered = ours(template, messages)
    assert (
        rendered.startswith("[user]# Tools\n")
        and "</tool_call>\n\nHow is it in Ulm?\n[assistant]<tool_call>\n" in rendered
    )
    assert rendered.endswith(
        "</tool_call>\n[user]<tool_response>\nRain\n</tool_response>\n<tool_response>\nSun\n</tool_response>\nThanks\n"
    )
    assert ours(template, messages, None) == "[user]How is it in Ulm?" + rendered.partition("How is it in Ulm?")[2]


def test_calls_are_written_as_the_template_does_when_no_tools_are_given() -> None:
    """Nothing asks for another form then."""
    name = "deepseek-ai-DeepSeek-V3.1"
    messages = [USER, calling(as_objects(0)), result(0, name="weather")]
    expected = theirs(model(name).read_text(), messages, None)
    assert ours(read(model(name)), [USER, calling(call(0)), result(0)], None) == expected
    described = ours(read(model(name)), [USER, calling(call(0)), result(0)])
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>' in described


def test_a_result_behind_a_question_is_told_there() -> None:
    """Some templates refuse the role there."""
    later = [USER, calling(call(0)), {"role": "user", "content": "Well?"}, result(0)]
    assert "[user]Well?\n<tool_response>\nRain\n</tool_response>\n" in ours(ChatTemplate(ALTERNATING, SPECIAL), later)
    both = [USER, calling(call(0), call(1)), result(1), {"role": "user", "content": "Well?"}, result(0)]
    assert "Sun\n</tool_response>\nWell?\n<tool_response>\nRain\n" in ours(ChatTemplate(ALTERNATING, SPECIAL), both)
    assert "Well?\n<tool_response>\nRain\n</tool_response><|end|>" in ours(read(model("openai-gpt-oss-120b")), later)


def test_no_tools_are_nothing() -> None:
    for path in (model("Qwen-Qwen2.5-7B-Instruct"), model("google-gemma-2-2b-it")):
        assert ours(read(path), [USER], []) == ours(read(path), [USER], None) == theirs(path.read_text(), [USER], None)


def test_a_model_with_a_template_for_tools_uses_it_for_tools_alone() -> None:
    backend = copy.copy(transformers_tokenizer())
    tool_use = model("NousResearch-Hermes-3-Llama-3.1-8B-tool_use").read_text()
    backend.chat_template = {"default": CHATML, "tool_use": tool_use}
    tokenizer = Tokenizer(backend)
    kind = {"add_generation_prompt": True, "continue_final_message": False}
    assert tokenizer.render([USER], **kind) == theirs(CHATML, [USER], None)
    assert tokenizer.render([USER], **kind, tools=TOOLS) == theirs(tool_use, [USER])
    assert tokenizer.tool_template is not None and tokenizer.tool_template.source == tool_use


def test_what_the_openai_package_gives_back_is_taken() -> None:
    answer = ChatCompletionMessage.model_validate(
        calling(call(0), annotations=[], reasoning_details=[], reasoning_content="Hm") | {"parsed": None}
    )
    template = read(model("Qwen-Qwen2.5-7B-Instruct"))
    for sent in (answer.model_dump(), answer.model_dump(exclude_none=True), answer.to_dict()):
        assert ours(template, [USER, sent, result(0)]) == ours(template, [USER, calling(call(0)), result(0)])
    pieces = calling(call(0, index=0)) | {"provider_specific_fields": {"refusal": None}, "cache_control": {}}
    assert ours(template, [USER, pieces, result(0)]) == ours(template, [USER, calling(call(0)), result(0)])
    assert ours(template, [USER, {"role": "assistant", "content": "Hi", "tool_calls": []}]) == ours(
        template, [USER, {"role": "assistant", "content": "Hi"}]
    )


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ({}, "must be a list"),
        ([5], "message 0 has no role"),
        ([USER, {"content": "x"}], "message 1 has no role"),
        ([{"role": "user", "content": 5}], "the content of message 0: it must be a text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "part 0 of message 0: it must be a text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "part 0 of message 0: image_url must be an object"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "parts of type 'input_audio' are not supported"),
        ([USER | {"name": 5}], "name of message 0: it must be a text"),
        ([calling(call(0), reasoning_content={})], "reasoning_content of message 0: it must be a text"),
        ([USER | {"tool_calls": [call(0)]}], "message 0 holds tool_calls; only messages of role 'assistant'"),
        ([USER | {"tool_call_id": "x"}], "message 0 holds tool_call_id; only messages of role 'tool'"),
        ([USER | {"audio": {"id": "x"}}], "message 0 holds audio, which the chat template does not read"),
        ([calling(call(0), annotations=[{}])], "message 0 holds annotations"),
        ([calling(call(0), refusal="No")], "message 0 holds a refusal"),
        ([calling(call(0), function_call={"name": "f"})], "function_call, which is deprecated; send tool_calls"),
        ([USER, calling(call(0)), result(1)], f"message 2 has tool_call_id '{IDS[1]}', which is the id of no call"),
        ([USER, result(0), calling(call(0))], "message 1 has tool_call_id .* before it"),
        ([USER, calling(call(0)), {"role": "tool", "content": "x"}], "message 2 has no tool_call_id"),
        ([USER, calling(call(0), call(0))], "message 1 has two calls of id"),
        ([USER, calling(*[call(0)] * (MAX_CALLS + 1))], f"{MAX_CALLS + 1} tool_calls; at most {MAX_CALLS}"),
        ([USER, {"role": "assistant", "tool_calls": "x"}], "tool_calls of message 1 must be a list"),
        ([USER, calling("x")], r"tool_calls\[0\] of message 1 must be an object"),
        ([USER, calling(call(0), call(1, id=""))], r"tool_calls\[1\] of message 1: id must be a text of 1 to"),
        ([USER, calling(call(0, type="custom"))], "is of type 'custom'; only 'function'"),
        ([USER, calling(call(0, function=None))], "has no function"),
        ([USER, calling(call(0, function={"name": "f", "x": 1}))], r"the function of tool_calls\[0\].* has no x"),
        ([USER, calling(call(0, function={"name": "", "arguments": "{}"}))], "function.name must be a text"),
        ([USER, calling(call(0, custom={}))], "has no custom"),
        *(
            ([USER, calling(call(0, arguments))], r"tool_calls\[0\] of message 1: function.arguments must be the JSON")
            for arguments in (
                '{"a": 1e999}',
                "null",
                "[]",
                '"x"',
                '{"a": NaN}',
                '{"a": 1',
                "[" * 10**5,
                '{"a": "\\ud800"}',
                5,
                [1],
            )
        ),
    ],
)
def test_what_is_wrong_with_messages_is_said_by_name(messages: Any, why: str) -> None:
    template = read(model("Qwen-Qwen2.5-7B-Instruct"))
    with pytest.raises(InvalidParameter, match=why) as refused:
        ours(template, messages)
    assert refused.value.parameter == "messages"
    assert len(str(refused.value)) < 300


def test_further_fields_reach_templates_that_read_them_and_are_refused_elsewhere() -> None:
    message = {"role": "user", "content": "x", "mood": "glad"}
    for source in ("{{ messages[0].mood }}", "{{ messages[0]['mood'] }}", "{{ messages[0].get('mood') }}"):
        assert ours(ChatTemplate(source, {}), [message], None) == "glad"
    with pytest.raises(InvalidParameter, match="message 0 holds mood, which the chat template does not read"):
        ours(ChatTemplate(CHATML, {}), [message], None)


def test_an_answer_that_ends_in_calls_is_not_continued() -> None:
    with pytest.raises(InvalidParameter, match="last message without tool_calls"):
        ours(ChatTemplate(CHATML, {}), [USER, calling(call(0), content="Let me")], continued=True)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NEARLY_A_CALL = st.fixed_dictionaries(
    {},
    optional={
        "id": st.sampled_from(["a", "b", ""]) | JSON,
        "type": st.just("function") | JSON,
        "function": st.fixed_dictionaries(
            {"name": st.just("weather") | JSON, "arguments": JSON.map(json.dumps) | JSON}, optional={"x": JSON}
        )
        | JSON,
    },
)
NEARLY_A_MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "developer", "user", "assistant", "assistant", "tool", "tool", "x"])},
    optional={
        "content": st.text(max_size=5)
        | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": st.text()}))
        | JSON,
        "tool_calls": st.lists(NEARLY_A_CALL, max_size=3) | JSON,
        "tool_call_id": st.sampled_from(["a", "b"]) | JSON,
        "name": st.text(max_size=5) | JSON,
        "reasoning_content": st.text(max_size=5) | JSON,
        "refusal": JSON,
    },
)


@pytest.mark.parametrize(
    "name",
    ["Qwen-Qwen2.5-7B-Instruct", "mistralai-Mistral-Nemo-Instruct-2407", "openai-gpt-oss-120b", "google-gemma-2-2b-it"],
)
@given(messages=st.lists(NEARLY_A_MESSAGE | JSON, max_size=5) | JSON, tools=st.booleans(), continued=st.booleans())
def test_any_json_is_rendered_or_refused(name: str, messages: Any, tools: bool, continued: bool) -> None:
    try:
        assert isinstance(ours(read(model(name)), messages, TOOLS if tools else None, continued=continued), str)
    except InvalidParameter as error:
        assert error.parameter in ("messages", "continue_final_message")


def test_tools_are_named_by_ids_where_the_template_writes_no_names() -> None:
    template = ChatTemplate(
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>"
        "{% if m.tool_calls %}{% for c in m.tool_calls %}[{{ c.id }}]{{ c.function.arguments | tojson }}{% endfor %}"
        "{% elif m.role == 'tool' %}## Return of {{ m.tool_call_id }}\n{{ m.content }}"
        "{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}",
        {},
    )
    later = call(0, id="another")
    answered = result(0, tool_call_id="another")
    written = ours(template, [USER, calling(call(0), call(1)), result(0), result(1), USER, calling(later), answered])
    names = ["functions.weather:0", "functions.weather:1", "functions.weather:2"]
    assert re.findall(r"\[(\S+?)\]\{", written) == names
    assert re.findall(r"Return of (\S+)", written) == names


def test_tools_are_described_in_words_where_nothing_is_known_of_how_they_are_called() -> None:
    template = read(model("Apertus-8B-Instruct"))
    assert template.knows_tools
    template.describe_tools()
    written = ours(template, [USER, calling(call(0)), result(0)])
    assert "within <tools></tools> XML tags" in written
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>' in written


def test_no_arguments_may_be_an_empty_text() -> None:
    template = read(model("Qwen-Qwen2.5-7B-Instruct"))
    empty, braces = (ours(template, [USER, calling(call(0, text)), result(0)]) for text in ("", "{}"))
    assert empty == braces
