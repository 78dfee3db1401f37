"""Families' ways to write an assistant's turn, as their chat templates do, and a vocabulary that has their tokens."""

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

from quire_engine.text.chat_template import ChatTemplate
from quire_engine.text.formats.bind import BoundFormat, bind
from quire_engine.text.formats.facts import Format
from quire_engine.text.formats.families import CALLS, REASONING
from quire_engine.text.formats.parser import OutputParser, Piece
from quire_engine.text.formats.tools import Tool, tools_of
from quire_engine.text.tokenizer import Tokenizer
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast
from vocabularies import byte_level

# The reasoning that a family's models have, where they have one.
REASONING_OF = {
    "hermes": "think",
    "qwen3_coder": "think",
    "glm45": "think",
    "deepseek_v31": "think",
    "kimi_k2": "think",
    "minimax_m2": "think",
    "olmo3": "think",
    "seed_oss": "seed_oss",
    "mistral": "mistral",
    "granite": "granite",
    "cohere": "cohere",
    "openai": "openai",
    "gemma4": "gemma4",
}
# Delimiters that are no tokens of their own in any vocabulary of the family.
NO_TOKENS = {"<function_calls>", "</function_calls>"}
_NAMED = "{%- set f = call.function -%}"
_PYTHON = """
{%- macro literal(v) -%}
{%- if v is none -%}None{%- elif v is sameas true -%}True{%- elif v is sameas false -%}False
{%- elif v is mapping -%}{{ '{' }}{%- for k, x in v.items() -%}{{ k|tojson }}: {{ literal(x) }}
{%- if not loop.last %}, {% endif -%}{%- endfor -%}{{ '}' }}
{%- elif v is iterable and v is not string -%}[{%- for x in v -%}{{ literal(x) }}
{%- if not loop.last %}, {% endif -%}{%- endfor -%}]
{%- else -%}{{ v|tojson }}{%- endif -%}
{%- endmacro -%}
{%- macro python(f) -%}
{{ f.name }}({%- for k, v in f.arguments.items() -%}{{ k }}={{ literal(v) }}
{%- if not loop.last %}, {% endif -%}{%- endfor -%})
{%- endmacro -%}
"""
_GEMMA = """
{%- macro literal(v, q) -%}
{%- if v is none -%}null{%- elif v is string -%}{{ q }}{{ v }}{{ q }}
{%- elif v is mapping -%}{{ '{' }}{%- for k, x in v.items() -%}{{ k }}:{{ literal(x, q) }}
{%- if not loop.last %},{% endif -%}{%- endfor -%}{{ '}' }}
{%- elif v is iterable -%}[{%- for x in v -%}{{ literal(x, q) }}
{%- if not loop.last %},{% endif -%}{%- endfor -%}]
{%- else -%}{{ v|tojson }}{%- endif -%}
{%- endmacro -%}
"""
_EACH = "{%- for call in m.tool_calls -%}" + _NAMED
_TEMPLATES = {
    "hermes": "{{ m.content }}"
    + _EACH
    + """{% if not loop.first or m.content %}{{ '\\n' }}{% endif %}<tool_call>
{"name": "{{ f.name }}", "arguments": {{ f.arguments|tojson }}}
</tool_call>{% endfor %}""",
    "qwen3_coder": "{{ m.content }}"
    + _EACH
    + """{{ '\\n' }}<tool_call>
<function={{ f.name }}>{{ '\\n' }}
{%- for k, v in f.arguments.items() %}<parameter={{ k }}>
{{ v if v is string else v|tojson }}
</parameter>{{ '\\n' }}{% endfor -%}
</function>
</tool_call>{% endfor %}""",
    "seed_oss": "{{ m.content }}"
    + _EACH
    + """{{ '\\n' }}<seed:tool_call>
<function={{ f.name }}>{{ '\\n' }}
{%- for k, v in f.arguments.items() %}<parameter={{ k }}>{{ v if v is string else v|tojson }}</parameter>
{{- '\\n' }}{% endfor -%}
</function>
</seed:tool_call>{% endfor %}""",
    "llama3_json": "{{ m.content }}"
    + _EACH
    + """{"name": "{{ f.name }}", "parameters": {{ f.arguments|tojson }}}
{%- if not loop.last %}; {% endif %}{% endfor %}""",
    "pythonic": _PYTHON
    + "{{ m.content }}{% if m.tool_calls %}["
    + _EACH
    + "{{ python(f) }}{% if not loop.last %}, {% endif %}{% endfor %}]{% endif %}",
    "lfm2": _PYTHON
    + "{{ m.content }}{% if m.tool_calls %}<|tool_call_start|>["
    + _EACH
    + "{{ python(f) }}{% if not loop.last %}, {% endif %}{% endfor %}]<|tool_call_end|>{% endif %}",
    "olmo3": _PYTHON
    + "{{ m.content }}{% if m.tool_calls %}<function_calls>{{ '\\n' }}"
    + _EACH
    + "{{ python(f) }}{{ '\\n' }}{% endfor %}</function_calls>{% endif %}",
    "mistral": "{{ m.content }}" + _EACH + "[TOOL_CALLS]{{ f.name }}[ARGS]{{ f.arguments|tojson }}{% endfor %}",
    "deepseek_v3": "{{ m.content }}{% if m.tool_calls %}<｜tool▁calls▁begin｜>"
    + _EACH
    + """<｜tool▁call▁begin｜>function<｜tool▁sep｜>{{ f.name }}
```json
{{ f.arguments|tojson }}
```<｜tool▁call▁end｜>{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}<｜tool▁calls▁end｜>{% endif %}""",
    "deepseek_v31": "{{ m.content }}{% if m.tool_calls %}<｜tool▁calls▁begin｜>"
    + _EACH
    + "<｜tool▁call▁begin｜>{{ f.name }}<｜tool▁sep｜>{{ f.arguments|tojson }}<｜tool▁call▁end｜>{% endfor %}"
    + "<｜tool▁calls▁end｜>{% endif %}",
    "openai": """{% if m.content %}<|channel|>final<|message|>{{ m.content }}{% endif %}"""
    + _EACH
    + """{% if not loop.first %}<|start|>assistant{% elif m.content %}<|end|><|start|>assistant{% endif %}
<|channel|>commentary to=functions.{{ f.name }} <|constrain|>json<|message|>
{{- f.arguments|tojson }}<|call|>{% endfor %}""",
    "glm45": "{{ m.content }}"
    + _EACH
    + """{{ '\\n' }}<tool_call>{{ f.name }}{{ '\\n' }}
{%- for k, v in f.arguments.items() %}<arg_key>{{ k }}</arg_key>
<arg_value>{{ v if v is string else v|tojson }}</arg_value>{{ '\\n' }}{% endfor -%}
</tool_call>{% endfor %}""",
    "kimi_k2": "{{ m.content }}{% if m.tool_calls %}<|tool_calls_section_begin|>"
    + _EACH
    + "<|tool_call_begin|>functions.{{ f.name }}:{{ loop.index0 }}<|tool_call_argument_begin|>"
    + "{{ f.arguments|tojson }}<|tool_call_end|>{% endfor %}<|tool_calls_section_end|>{% endif %}",
    "minimax_m2": "{{ m.content }}{% if m.tool_calls %}{{ '\\n' }}<minimax:tool_call>{{ '\\n' }}"
    + _EACH
    + """<invoke name="{{ f.name }}">{{ '\\n' }}
{%- for k, v in f.arguments.items() -%}
<parameter name="{{ k }}">{{ v if v is string else v|tojson }}</parameter>{{ '\\n' }}
{%- endfor -%}
</invoke>{{ '\\n' }}{% endfor %}</minimax:tool_call>{% endif %}""",
    "granite": "{{ m.content }}{% if m.tool_calls %}<|tool_call|>["
    + _EACH
    + '{"name": "{{ f.name }}", "arguments": {{ f.arguments|tojson }}}{% if not loop.last %}, {% endif %}'
    + "{% endfor %}]{% endif %}",
    "phi4_mini_json": "{{ m.content }}{% if m.tool_calls %}<|tool_call|>["
    + _EACH
    + '{"name": "{{ f.name }}", "arguments": {{ f.arguments|tojson }}}{% if not loop.last %}, {% endif %}'
    + "{% endfor %}]<|/tool_call|>{% endif %}",
    "cohere": "{% if m.content %}<|START_RESPONSE|>{{ m.content }}<|END_RESPONSE|>{% endif %}"
    + "{% if m.tool_calls %}<|START_ACTION|>{{ '[\\n    ' }}"
    + _EACH
    + '{"tool_call_id": "{{ loop.index0 }}", "tool_name": "{{ f.name }}", "parameters": {{ f.arguments|tojson }}}'
    + "{% if not loop.last %}{{ ',\\n    ' }}{% endif %}{% endfor %}{{ '\\n]' }}<|END_ACTION|>{% endif %}",
    "functiongemma": _GEMMA
    + "{{ m.content }}"
    + _EACH
    + "<start_function_call>call:{{ f.name }}{{ '{' }}{%- for k, v in f.arguments.items() -%}"
    + "{{ k }}:{{ literal(v, '<escape>') }}{% if not loop.last %},{% endif %}{% endfor %}{{ '}' }}"
    + "<end_function_call>{% endfor %}",
    "gemma4": _GEMMA
    + "{{ m.content }}"
    + _EACH
    + "<|tool_call>call:{{ f.name }}{{ '{' }}{%- for k, v in f.arguments.items() -%}"
    + "{{ k }}:{{ literal(v, '<|\"|>') }}{% if not loop.last %},{% endif %}{% endfor %}{{ '}' }}"
    + "<tool_call|>{% endfor %}",
}
_SCHEMA = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "count": {"type": "integer"},
        "ratio": {"type": "number"},
        "flag": {"type": "boolean"},
        "maybe": {"type": ["string", "null"]},
        "unit": {"enum": ["celsius", "kelvin"]},
        "tags": {"type": "array", "items": {"type": "string"}},
        "place": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "zip": {"type": ["integer", "null"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
    "additionalProperties": False,
}
TOOLS: list[Tool] = tools_of(
    [
        {"type": "function", "function": {"name": "run_in", "parameters": _SCHEMA, "strict": True}},
        {"type": "function", "function": {"name": "run_in_terminal", "parameters": _SCHEMA}},
        {"type": "function", "function": {"name": "now"}},
    ]
)

ARGUMENTS: list[dict[str, Any]] = [  # in the order of the schema, in which grammars have them
    {},
    {"text": "plain"},
    {"text": "naïve 你好 🌍", "count": 3, "ratio": 2.5, "flag": True},
    {"text": 'say "hi", it\'s C:\\new\\dir', "count": -1, "flag": False, "maybe": None},
    {"text": "two\nlines\tand } ] ) , <b> & {", "maybe": "null and void", "unit": "kelvin"},
    {"text": "5", "tags": ["a", "b, c"], "place": {"city": "Köln", "zip": 50667}},
    {"text": "", "ratio": 1e-07, "tags": [], "place": {"city": "", "zip": None}},
]


@dataclass(frozen=True)
class Family:
    """A family with a vocabulary."""

    name: str
    tokenizer: Tokenizer
    backend: Any
    form: BoundFormat

    def marked(self, tokens: list[int]) -> list[str]:
        """What each token adds to the marked text."""
        stream = self.tokenizer.stream(skip_special_tokens=True, spaces_between_special_tokens=True)
        return [self.form.marks.get(token) or stream.step(token) for token in tokens]

    def read(self, text: str, tools: list[Tool] = TOOLS, *, in_reasoning: bool = False) -> list[Piece]:
        """A text as the model would write it, parsed token by token."""
        return parse(self.form, self.marked(self.tokenizer.encode(text, add_special_tokens=False)), tools, in_reasoning)

    def turn(self, content: str, calls: list[tuple[str, dict[str, Any]]]) -> str:
        """An assistant's turn."""
        template = ChatTemplate("{%- set m = messages[-1] -%}" + _TEMPLATES[self.name], {})
        message = {
            "role": "assistant",
            "content": content,
            "tool_calls": [
                {"id": f"{place:09}", "type": "function", "function": {"name": name, "arguments": arguments}}
                for place, (name, arguments) in enumerate(calls)
            ],
        }
        return template.render([message], add_generation_prompt=False, continue_final_message=False, variables={})


@cache
def family(name: str, *, tokens: bool = True) -> Family:
    """`tokens`: whether the vocabulary has the family's delimiters as tokens."""
    form = Format(
        name=name, calls=CALLS[name], reasoning=REASONING[REASONING_OF[name]] if name in REASONING_OF else None
    )
    return bound(form, tokens=tokens)


@cache
def bound(form: Format, *, tokens: bool = True) -> Family:
    """A format with a vocabulary that has its delimiters as tokens, or not."""
    fast = byte_level()
    if tokens:
        marks = [mark for mark in sorted(delimiters(form)) if mark not in NO_TOKENS]
        fast.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    fast.add_tokens([AddedToken(word, normalized=False) for word in ("\n</parameter>", "</parameter")])
    backend = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>")
    tokenizer = Tokenizer(backend)
    return Family(form.name, tokenizer, backend, bind(form, tokenizer))


def delimiters(facts: Any) -> set[str]:
    """The texts of all marks within facts."""
    from quire_engine.text.formats.facts import Mark

    if isinstance(facts, Mark):
        return {facts.text}
    inner = (
        facts if isinstance(facts, tuple) else [getattr(facts, name, ()) for name in getattr(facts, "__slots__", ())]
    )
    return {mark for one in inner if not isinstance(one, str) for mark in delimiters(one)}


def parse(form: BoundFormat, chunks: list[str], tools: list[Tool], in_reasoning: bool) -> list[Piece]:
    """A marked text in chunks, parsed; pieces that go on with one another merged."""
    parser = OutputParser(form, tools, in_reasoning=in_reasoning)
    pieces = [piece for chunk in chunks for piece in parser.push(chunk)] + parser.finish()
    merged: list[Piece] = []
    for piece in pieces:
        if merged and merged[-1].kind == piece.kind != "call":
            merged[-1] = Piece(piece.kind, merged[-1].text + piece.text)
        else:
            merged.append(piece)
    return merged


def calls_of(pieces: list[Piece]) -> list[tuple[str, Any]]:
    """Names and arguments."""
    calls: list[tuple[str, str]] = []
    for piece in pieces:
        if piece.kind == "call":
            calls.append((piece.text, ""))
        elif piece.kind == "arguments":
            calls[-1] = (calls[-1][0], calls[-1][1] + piece.text)
    return [(name, json.loads(arguments)) for name, arguments in calls]


def text_of(pieces: list[Piece], kind: str) -> str:
    """All text of one kind."""
    return "".join(piece.text for piece in pieces if piece.kind == kind)


NAMES = sorted(CALLS)
