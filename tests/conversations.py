"""A tiny model that reasons and calls tools, and conversations with it that are guided in every way there is."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from conftest import make_checkpoint
from quire import LLM, SamplingParams
from quire.llm import Completion, RequestOutput
from quire.messages import Output
from quire_engine.text.formats.chat import ToolUse
from quire_engine.text.params import TokenSampling
from quire_engine.text.tokenizer import Tokenizer
from vocabularies import byte_level

MODEL = "talker"
CONTEXT = 1024
END = 1
BUDGET = 60  # tokens of reasoning
_SIZE = 448  # of the logits, which have more ids than there are tokens
_ADDED = ("<think>", "</think>", "<tool_call>", "</tool_call>")
_TEMPLATE = """{% for tool in tools or [] %}{{ tool.function.name }} {% endfor -%}
{% for m in messages %}{{ m.content }} {% for call in m.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments|tojson }}}
</tool_call>{% endfor %}{% endfor -%}
{% if thinking == "opened" or not thinking %}<think>{% elif thinking == "closed" %}<think></think>{% endif %}"""


def talking_checkpoint(folder: Path) -> Path:
    """A Qwen 3 whose tokens write any text, with the delimiters of its family's calls; its prompts open `<think>`, but
    where `thinking` is to be "closed" there, or "maybe" to come."""
    from transformers import PreTrainedTokenizerFast

    known = {"vocab_size": _SIZE, "bos_token_id": 0, "eos_token_id": END, "pad_token_id": 0}
    make_checkpoint(folder, "qwen3", max_position_embeddings=CONTEXT, **known)
    tokenizer = byte_level()
    tokenizer.add_special_tokens(list(_ADDED))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = _TEMPLATE
    fast.save_pretrained(folder)
    return folder


@dataclass
class Told:
    """What a reader has of one choice when all of it has come."""

    tokens: list[int] = field(default_factory=list)
    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)  # name, arguments
    finish_reason: str | None = None
    scores: list[float] = field(default_factory=list)  # log-probabilities of the tokens

    def add(self, delta: Output) -> None:
        """What is new, of a gRPC stream."""
        self.tokens += delta.token_ids
        self.content += delta.text
        self.reasoning += delta.reasoning
        for part in delta.tool_calls:
            self.call(part.index, part.name, part.arguments)
        self.scores += [one.chosen.logprob for one in delta.logprobs]
        self.finish_reason = delta.finish_reason or self.finish_reason

    def add_event(self, choice: dict[str, Any]) -> None:
        """What is new, of OpenAI's events."""
        delta = choice["delta"]
        self.tokens += choice.get("token_ids", [])
        self.content += delta.get("content") or ""
        self.reasoning += delta.get("reasoning_content") or ""
        for part in delta.get("tool_calls", []):
            self.call(part["index"], part["function"].get("name", ""), part["function"]["arguments"])
        self.scores += [one["logprob"] for one in (choice["logprobs"] or {"content": []})["content"]]
        self.finish_reason = choice["finish_reason"] or self.finish_reason

    def call(self, index: int, name: str, arguments: str) -> None:
        """A piece of a call, the first of each with its name."""
        if index == len(self.calls):
            assert name, "a call begins with its name"
            self.calls.append((name, arguments))
        else:
            assert not name, "a call has one name"
            known, before = self.calls[index]
            self.calls[index] = (known, before + arguments)


def tool(name: str, **properties: Any) -> dict[str, Any]:
    """A function whose arguments are all wanted."""
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": f"{name}s", "parameters": schema}}


_WORDS = {"type": "array", "items": {"type": "string", "minLength": 4, "maxLength": 9}, "minItems": 9, "maxItems": 12}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"words": _WORDS, "unit": {"enum": ["é\n", '"']}, "n": {"type": "integer", "maximum": 99}},
    "required": ["words", "unit", "n"],
    "additionalProperties": False,
}
TOOLS = [
    tool("find", words=_WORDS, unit={"enum": ["é\n", '"']}),
    tool("finish", note={"type": "string", "minLength": 20, "maxLength": 60}),
]
_ROWS = r"([a-f]{3}[0-9]{2},){24,30}"
_LARK = 'start: row+\nrow: /[a-c]{2}/ ("<" row ">")* ";"\n'
_TAGS = {
    "type": "structural_tag",
    "triggers": ["="],
    "structures": [{"begin": "=x", "schema": {"enum": [[1, "two"], {"three": None}]}, "end": "</x>"}],
}


def _is_json(text: str) -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(text))


def _is_rows(text: str) -> None:
    assert re.fullmatch(_ROWS, text.strip())


def _has_tags(text: str) -> None:
    for part in text.split("=")[1:]:
        begun, value, _ = re.split("^x|</x>", part)
        assert not begun
        assert json.loads(value) in ([1, "two"], {"three": None})


def _is_anything(text: str) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How answers are guided, and what content is right once it has ended by itself."""

    options: dict[str, Any]
    is_right: Callable[[str], None] = _is_anything


KINDS: dict[str, Kind] = {
    "a schema": Kind(options={"thinking": "closed", "structured_outputs": {"json": SCHEMA}}, is_right=_is_json),
    "calls that have to be": Kind(options={"tools": TOOLS, "tool_choice": "required", "thinking_token_budget": 30}),
    "reasoning with a budget": Kind(options={"thinking_token_budget": BUDGET, "likely": {"</s>": -100.0}}),
    "tags": Kind(
        options={"thinking": "closed", "structured_outputs": {"structural_tag": _TAGS}, "likely": {"=": 4.0}},
        is_right=_has_tags,
    ),
    "calls as it likes": Kind(options={"tools": TOOLS, "likely": {"<tool_call>": 4.0}, "thinking_token_budget": 40}),
    "a schema behind reasoning": Kind(
        options={"structured_outputs": {"json": SCHEMA}, "thinking_token_budget": 50}, is_right=_is_json
    ),
    "a regular expression": Kind(
        options={"thinking": "closed", "structured_outputs": {"regex": _ROWS}}, is_right=_is_rows
    ),
    "a call that is named": Kind(
        options={
            "thinking": "closed",
            "tools": TOOLS,
            "tool_choice": {"type": "function", "function": {"name": "find"}},
        },
    ),
    "stop strings": Kind(options={"stop": ["the ", "e", "ing"], "min_tokens": 90, "thinking_token_budget": 30}),
    "calls or a schema": Kind(
        options={
            "thinking": "closed",
            "tools": TOOLS,
            "structured_outputs": {"json": SCHEMA},
            "likely": {"<tool_call>": 2.0},
        }
    ),
    "a schema, behind reasoning or not": Kind(
        options={
            "thinking": "maybe",
            "structured_outputs": {"json": SCHEMA},
            "thinking_token_budget": 30,
            "likely": {"<think>": 2.0},
        },
        is_right=_is_json,
    ),
    "a grammar": Kind(options={"structured_outputs": {"grammar": _LARK}, "thinking_token_budget": 20}),
}
MORE: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"n": 2, "logprobs": 1},
    {"temperature": 0.8, "presence_penalty": 0.5, "frequency_penalty": 0.2, "repetition_penalty": 1.2},
    {"min_tokens": 100, "top_p": 0.95},
    {"top_k": 200, "logprobs": 1},
]


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """`number`: of its seed and its prompt. `more`: sampling parameters."""

    number: int
    kind: str
    more: dict[str, Any] = field(default_factory=dict)
    tokens: int  # of the answer, at most

    @property
    def messages(self) -> list[dict[str, str]]:
        """Each begins elsewhere in the same text."""
        return [{"role": "user", "content": "the quick brown fox jumps over the lazy dog "[self.number % 40 :]}]

    def options(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """As the gRPC client takes them."""
        given = {"seed": self.number, "max_tokens": self.tokens} | KINDS[self.kind].options | self.more
        words = {token: tokenizer.token_bytes(token) for token in range(tokenizer.size)}
        biases = {token: -9.0 for token, word in words.items() if not word.strip()}  # else JSON is mostly space
        for text, bias in given.pop("likely", {}).items():
            biases[tokenizer.encode(text, add_special_tokens=False)[0]] = bias
        given["logit_bias"] = biases | given.get("logit_bias", {})
        if "thinking" in given:
            given["chat_template_kwargs"] = {"thinking": given.pop("thinking")}
        return given

    def body(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """As OpenAI's API takes them."""
        given = self.options(tokenizer)
        if "logprobs" in given:
            given["top_logprobs"], given["logprobs"] = given["logprobs"], True
        given["logit_bias"] = {str(token): bias for token, bias in given["logit_bias"].items()}
        return given | {"model": MODEL, "messages": self.messages, "stream": True, "return_token_ids": True}

    def unread(self) -> list[Told]:
        """Before anything has come."""
        return [Told() for _ in range(self.more.get("n", 1))]

    def check(self, answer: list[Told]) -> None:
        """Whether it is what was asked for."""
        kind = KINDS[self.kind]
        for one in answer:
            assert one.finish_reason in ("stop", "tool_calls", "length")
            if one.finish_reason != "length":
                for name, arguments in one.calls:
                    [schema] = [tool["function"]["parameters"] for tool in TOOLS if tool["function"]["name"] == name]
                    jsonschema.Draft202012Validator(schema).validate(json.loads(arguments))
                if not one.calls:
                    kind.is_right(one.content)
            if "tool_choice" in kind.options:
                assert one.calls


def conversations(count: int, *, tokens: int = 240) -> list[Conversation]:
    """Of every kind, with every parameter."""
    kinds = [*KINDS]
    return [
        Conversation(number=number, kind=kinds[number % len(kinds)], more=MORE[number % len(MORE)], tokens=tokens)
        for number in range(count)
    ]


def same(found: Sequence[list[Told]], expected: Sequence[list[Told]]) -> None:
    """Token by token and letter by letter; log-probabilities may differ by rounding."""
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert replace(one, scores=[]) == replace(other, scores=[])
            assert one.scores == pytest.approx(other.scores, abs=1e-3)


def prepared(llm: LLM, one: Conversation, **changes: Any) -> tuple[RequestOutput, TokenSampling]:
    """What an engine gets of it."""
    options = one.options(llm.tokenizer) | changes
    tools, choice = options.pop("tools", None), options.pop("tool_choice", None)
    prompt = llm.tokenizer.render(
        one.messages,
        add_generation_prompt=True,
        continue_final_message=False,
        variables=options.pop("chat_template_kwargs", None),
        tools=tools,
    )
    tokens, params = llm.tokenizer.encode(prompt, add_special_tokens=False), SamplingParams(**options)
    use, budget = ToolUse.of(tools, choice, None), params.thinking_token_budget
    answer = llm.chat_format.answer(tokens, use, params.structured_outputs, thinking_budget=budget)
    return RequestOutput(prompt, tokens), llm.sampling(params, answer)


def answered(llm: LLM, conversations: Sequence[Conversation], **changes: Any) -> list[list[Told]]:
    """Without any server, all in one batch."""
    outputs = llm.run([prepared(llm, one, **changes) for one in conversations], use_tqdm=False)
    return [[_told(choice) for choice in output.outputs] for output in outputs]


def _told(choice: Completion) -> Told:
    assert choice.error is None, choice.error
    return Told(
        tokens=choice.token_ids,
        content=choice.text,
        reasoning=choice.reasoning,
        calls=[(call.name, call.arguments) for call in choice.tool_calls],
        finish_reason=choice.finish_reason,
        scores=[float(one.logprobs[0]) for one in choice.logprobs or []],
    )
