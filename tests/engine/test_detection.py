"""The format that is read off each model's own chat template is the one in which that template writes calls."""

import json
from pathlib import Path
from typing import Any

import pytest
from call_formats import calls_of, parse
from quire_engine.text.formats.chat import ChatFormat, ToolUse
from quire_engine.text.formats.tools import tools_of
from quire_engine.text.tokenizer import Tokenizer
from templates import TEMPLATES
from transformers import PreTrainedTokenizerFast
from vocabularies import byte_level

QUESTION = "How is it in Ulm?"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": PARAMETERS}}
]
ARGUMENTS = {"city": "Ulm", "days": 2}
CALL = {"id": "abcdefgh1", "type": "function", "function": {"name": "weather", "arguments": json.dumps(ARGUMENTS)}}
# Templates that lose calls of past turns, which are told in words then; of the tools they tell in their own way.
LOSE_CALLS = {"Kimi-K2-Instruct", "Kimi-K2-Thinking", "ibm-granite-granite-3.3-2B-Instruct"}
# Templates that are detected as one format and write another, so that tools and calls are told in words.
OWN_WAYS = {"MiniMax-M3", "meetkai-functionary-medium-v3.1", "unsloth-Apriel-1.5"}


def tokenizer_of(template: str | dict[str, str]) -> Tokenizer:
    backend = PreTrainedTokenizerFast(tokenizer_object=byte_level(), bos_token="<s>", eos_token="</s>")
    backend.chat_template = template
    return Tokenizer(backend)


COMMAND_R = "CohereForAI-c4ai-command-r-plus-tool_use"  # of conversations with tools; it refuses others
OTHER_NAME = "fireworks-ai-llama-3-firefunction-v2"  # refuses to go without tools by another name
RENDERED = [path for path in TEMPLATES if path.stem not in (COMMAND_R, OTHER_NAME)]


@pytest.mark.parametrize("path", RENDERED, ids=lambda path: path.stem)
def test_calls_as_the_template_writes_them_are_read(path: Path) -> None:
    tokenizer = tokenizer_of(path.read_text())
    form = ChatFormat(tokenizer)
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    written = tokenizer.render(messages, add_generation_prompt=False, continue_final_message=False, tools=TOOLS)
    turn = written[written.rindex(QUESTION) + len(QUESTION) :]
    bound = form.answer([], ToolUse.of(TOOLS, "auto", None), None).form
    assert bound is not None
    tools = tools_of(TOOLS)
    found = [calls_of(parse(bound, [turn[at:]], tools, False)) for at in range(turn.rindex("weather"))]
    assert ([("weather", ARGUMENTS)] in found) == (path.stem not in LOSE_CALLS)
    assert path.stem not in OWN_WAYS or "within <tools></tools> XML tags" in written


def test_tools_in_words_do_without_a_template_that_wants_tools() -> None:
    plain = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    with_tools = next(path for path in TEMPLATES if path.stem == COMMAND_R).read_text()
    tokenizer = tokenizer_of({"default": plain, "tool_use": with_tools})
    ChatFormat(tokenizer)
    messages = [{"role": "user", "content": QUESTION}]
    written = tokenizer.render(messages, add_generation_prompt=True, continue_final_message=False, tools=TOOLS)
    assert written.startswith("[system]# Tools") and '"name": "weather"' in written
