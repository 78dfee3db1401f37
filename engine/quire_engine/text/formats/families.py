"""How each family writes reasoning and calls: one literal table each, by the names that the field knows them by."""

from dataclasses import replace

from quire_engine.text.formats.facts import (
    Blank,
    Call,
    Calls,
    Either,
    Format,
    Json,
    Literals,
    Mark,
    Maybe,
    Pieces,
    Reasoning,
    Section,
    Space,
    Tagged,
    Text,
)

LINE, SPACE, NONE, _INDENTED = Space("\n"), Space(), Space(""), Space("\n    ")
_COMMA: Pieces = (NONE, Text(","), SPACE)
_COLON: Pieces = (NONE, Text(":"), SPACE)


def _field(name: str, *value: Text | Blank) -> Pieces:
    """A field of a JSON object, of a string that differs from call to call."""
    return (Text(f'"{name}"'), *_COLON, Text('"'), *value, Text('"'))


def _json_call(*keys: str, name: str = "name", first: Pieces = (), last: Pieces = ()) -> Call:
    """A call that is a JSON object of a name and arguments, under the first of these keys where we write it. `first`,
    `last`: fields around them."""
    key = Either(tuple((Text(f'"{one}"'),) for one in keys))
    return Call(
        before=(Text("{"), NONE, *first, *_field(name, Blank.NAME), *_COMMA, key, *_COLON),
        arguments=Json(),
        after=(*last, NONE, Text("}")),
    )


def _tags(begin: str, end: str, dropped: tuple[Pieces, ...] = ()) -> Reasoning:
    return Reasoning(begin=(Mark(begin),), end=(LINE, Mark(end)), dropped=dropped)


def _list(begin: Pieces, call: Call, end: Pieces = ()) -> Section:
    """Calls as a JSON list."""
    return Section(begin=(*begin, Text("["), NONE), call=call, between=_COMMA, end=(NONE, Text("]"), *end))


_HARMONY_FINAL: Pieces = (
    Mark("<|channel|>"),
    Either(((Text("final"),), (Text("commentary"),))),
    Maybe((NONE, Mark("<|constrain|>"), Text("json"))),
    Mark("<|message|>"),
)
_HARMONY_START = Maybe((Mark("<|start|>"), Text("assistant")))
_HARMONY_DROPPED: tuple[Pieces, ...] = (
    (Mark("<|start|>"), Text("assistant")),
    _HARMONY_FINAL,
    (Mark("<|end|>"),),
    (Mark("<|return|>"),),
    (Mark("<|call|>"),),
)
_HARMONY_JSON: Pieces = (
    Either(
        (
            (Text(" "), Mark("<|constrain|>"), Text("json")),
            (SPACE, Maybe((Mark("<|constrain|>"),)), Maybe((Either(((Text("json"),), (Text("code"),))),))),
        )
    ),
    Mark("<|message|>"),
)
_HARMONY_CHANNEL: Pieces = (Mark("<|channel|>"), Either(((Text("commentary"),), (Text("analysis"),))))


def _harmony(begin: Pieces, before: Pieces, *, only_first: bool = False) -> Section:
    return Section(
        begin=begin,
        call=Call(before=before, arguments=Json()),
        end=(Maybe((Mark("<|call|>"),)),),
        only_first=only_first,
        repeats=True,
        apart=(Mark("<|start|>"), Text("assistant")),
    )


_PYTHON = Literals(assign="=", words=("True", "False", "None"))
_PYTHON_CALL = Call(before=(Blank.NAME, Text("(")), arguments=_PYTHON, after=(NONE, Text(")")))


def _python_list(begin: Pieces, end: Pieces, *, only_first: bool) -> Section:
    return Section(
        begin=(*begin, Text("["), NONE),
        call=_PYTHON_CALL,
        between=_COMMA,
        end=(NONE, Text("]"), *end),
        only_first=only_first,
    )


def _gemma(begin: str, end: str, quote: str) -> Calls:
    style = Literals(assign=":", words=("true", "false", "null"), quote=(Mark(quote),), bare_keys=True)
    call = Call(before=(Text("call:"), Blank.NAME, Text("{")), arguments=style, after=(NONE, Text("}")))
    section = Section(begin=(Mark(begin),), call=call, end=(NONE, Mark(end)), repeats=True)
    return Calls(sections=(section,))


def _deepseek(before: Pieces, after: Pieces, *, line: Pieces) -> Calls:
    section = Section(
        begin=(LINE, Mark("<｜tool▁calls▁begin｜>")),
        call=Call(
            before=(NONE, Mark("<｜tool▁call▁begin｜>"), *before),
            arguments=Json(),
            after=(*after, Mark("<｜tool▁call▁end｜>")),
        ),
        between=line,
        end=(NONE, Mark("<｜tool▁calls▁end｜>")),
    )
    return Calls(sections=(section,))


_ON_LINES = Tagged(
    key=(LINE, Text("<parameter=")),
    value=(Text(">"), Either(((Text("\n"),), ()))),
    close=(Either(((Text("\n</parameter>"),), (Text("</parameter>"),))),),
)
_IN_LINE = Tagged(key=(LINE, Text("<parameter=")), value=(Text(">"),), close=(Text("</parameter>"),))


def _qwen_coder(begin: Pieces, end: Pieces, pairs: Tagged = _ON_LINES) -> Section:
    call = Call(before=(Text("<function="), Blank.NAME, Text(">")), arguments=pairs, after=(LINE, Text("</function>")))
    return Section(begin=begin, call=call, end=end, repeats=True, apart=(Text("\n"),))


def _one(begin: Pieces, call: Call, end: Pieces, *, apart: Pieces = ()) -> Calls:
    """A section for each call."""
    return Calls(sections=(Section(begin=begin, call=call, end=end, repeats=True, apart=apart),))


_BARE_LLAMA = _json_call("parameters", "arguments", first=(Maybe((*_field("type", Text("function")), *_COMMA)),))
_LLAMA_BETWEEN: Pieces = (NONE, Text(";"), SPACE)

REASONING: dict[str, Reasoning] = {
    "think": _tags("<think>", "</think>"),
    "hunyuan": replace(
        _tags("<think>", "</think>", ((Mark("<answer>"), LINE), (LINE, Mark("</answer>")))),
        before_content=(Maybe((Mark("<answer>"), LINE)),),
        after_content=(Maybe((LINE, Mark("</answer>"))),),
    ),
    "mistral": _tags("[THINK]", "[/THINK]"),
    "seed_oss": _tags("<seed:think>", "</seed:think>"),
    "exaone_deep": _tags("<thought>", "</thought>"),
    "cohere": replace(
        _tags(
            "<|START_THINKING|>",
            "<|END_THINKING|>",
            tuple(
                (Mark(mark),) for mark in ("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>")
            ),
        ),
        before_content=(Either(((Mark("<|START_RESPONSE|>"),), (Mark("<|START_TEXT|>"),))),),
        after_content=(Maybe((Either(((Mark("<|END_RESPONSE|>"),), (Mark("<|END_TEXT|>"),))),)),),
    ),
    "granite": Reasoning(
        begin=(Either(((Text("Here is my thought process:"),), (Text("Here's my thought process:"),))),),
        end=(LINE, Either(((Text("Here is my response:"),), (Text("Here's my response:"),)))),
        words=True,
    ),
    "openai": Reasoning(
        begin=(Mark("<|channel|>"), Text("analysis"), Mark("<|message|>")),
        end=(Mark("<|end|>"),),
        dropped=_HARMONY_DROPPED,
        before_content=(_HARMONY_START, Mark("<|channel|>"), Text("final"), Mark("<|message|>")),
        before_calls=(_HARMONY_START,),
    ),
    "gemma4": Reasoning(begin=(Mark("<|channel>"), Text("thought")), end=(LINE, Mark("<channel|>"))),
}
CALLS: dict[str, Calls] = {
    "hermes": _one(
        (LINE, Mark("<tool_call>"), LINE),
        _json_call("arguments", "parameters"),
        (LINE, Mark("</tool_call>")),
        apart=(Text("\n"),),
    ),
    "qwen3_coder": Calls(
        sections=(
            _qwen_coder((LINE, Mark("<tool_call>"), LINE), (LINE, Mark("</tool_call>"))),
            _qwen_coder((LINE,), (LINE, Maybe((Mark("</tool_call>"),)))),  # they forget the opener at times
        )
    ),
    "seed_oss": Calls(
        sections=(_qwen_coder((LINE, Mark("<seed:tool_call>"), LINE), (LINE, Mark("</seed:tool_call>")), _IN_LINE),)
    ),
    "llama3_json": Calls(
        sections=(
            Section(begin=(), call=_BARE_LLAMA, between=_LLAMA_BETWEEN, only_first=True),
            Section(begin=(Mark("<|python_tag|>"), NONE), call=_BARE_LLAMA, between=_LLAMA_BETWEEN),
        )
    ),
    "pythonic": Calls(
        sections=(
            _python_list((), (), only_first=True),
            _python_list((Mark("<|python_start|>"),), (Mark("<|python_end|>"),), only_first=False),
        )
    ),
    "lfm2": Calls(
        sections=(_python_list((Mark("<|tool_call_start|>"),), (Mark("<|tool_call_end|>"),), only_first=False),)
    ),
    "olmo3": Calls(
        sections=(
            Section(
                begin=(LINE, Mark("<function_calls>"), LINE),
                call=_PYTHON_CALL,
                between=(Space(""), Either(((Text("\n"),), ()))),
                end=(LINE, Mark("</function_calls>")),
            ),
        )
    ),
    "mistral": Calls(
        sections=(
            Section(
                begin=(Mark("[TOOL_CALLS]"),),
                call=Call(
                    before=(
                        Blank.NAME,
                        Maybe((Mark("[CALL_ID]"), Blank.ID)),
                        Either(((Mark("[ARGS]"),), ())),
                        NONE,
                    ),
                    arguments=Json(),
                ),
                repeats=True,
            ),
            _list(
                (Mark("[TOOL_CALLS]"), SPACE),
                _json_call("arguments", last=(Maybe((*_COMMA, *_field("id", Blank.ID))),)),
            ),
        )
    ),
    "deepseek_v3": _deepseek(
        (Text("function"), Mark("<｜tool▁sep｜>"), Blank.NAME, Text("\n```json\n")),
        (Text("\n```"),),
        line=(LINE,),
    ),
    "deepseek_v31": _deepseek((Blank.NAME, Mark("<｜tool▁sep｜>")), (), line=()),
    "openai": Calls(
        sections=(
            _harmony(
                (*_HARMONY_CHANNEL, Text(" to=functions.")),
                (Blank.NAME, *_HARMONY_JSON),
            ),
            _harmony(
                (Mark("<|start|>"), Text("assistant to=functions.")),
                (Blank.NAME, *_HARMONY_CHANNEL, *_HARMONY_JSON),
            ),
            _harmony((SPACE, Text("to=functions.")), (Blank.NAME, *_HARMONY_CHANNEL, *_HARMONY_JSON), only_first=True),
        ),
        dropped=_HARMONY_DROPPED,
    ),
    "glm45": _one(
        (LINE, Mark("<tool_call>")),
        Call(
            before=(NONE, Blank.NAME),
            arguments=Tagged(
                key=(LINE, Mark("<arg_key>")),
                value=(Mark("</arg_key>"), LINE, Mark("<arg_value>")),
                close=(Mark("</arg_value>"),),
            ),
            after=(LINE, Mark("</tool_call>")),
        ),
        (),
        apart=(Text("\n"),),
    ),
    "kimi_k2": Calls(
        sections=(
            Section(
                begin=(NONE, Mark("<|tool_calls_section_begin|>")),
                call=Call(
                    before=(
                        NONE,
                        Mark("<|tool_call_begin|>"),
                        NONE,
                        Either(((Text("functions."),), ())),
                        Blank.NAME,
                        Text(":"),
                        Blank.INDEX,
                        NONE,
                        Mark("<|tool_call_argument_begin|>"),
                        NONE,
                    ),
                    arguments=Json(),
                    after=(NONE, Mark("<|tool_call_end|>")),
                ),
                between=(),
                end=(NONE, Mark("<|tool_calls_section_end|>")),
            ),
        )
    ),
    "minimax_m2": Calls(
        sections=(
            Section(
                begin=(LINE, Mark("<minimax:tool_call>"), LINE),
                call=Call(
                    before=(Text('<invoke name="'), Blank.NAME, Text('">')),
                    arguments=Tagged(
                        key=(LINE, Text('<parameter name="')), value=(Text('">'),), close=(Text("</parameter>"),)
                    ),
                    after=(LINE, Text("</invoke>")),
                ),
                between=(LINE,),
                end=(LINE, Mark("</minimax:tool_call>")),
                repeats=True,
                apart=(Text("\n"),),
            ),
        )
    ),
    "granite": Calls(
        sections=(
            _list((Mark("<|tool_call|>"), NONE), _json_call("arguments")),
            _list((Mark("<tool_call>"), NONE), _json_call("arguments")),
        )
    ),
    "phi4_mini_json": Calls(
        sections=(
            _list((Mark("<|tool_call|>"), NONE), _json_call("arguments", "parameters"), (Mark("<|/tool_call|>"),)),
            _list((Text("functools"), NONE), _json_call("arguments", "parameters")),
        )
    ),
    "cohere": Calls(
        sections=(
            Section(
                begin=(Mark("<|START_ACTION|>"), LINE, Text("["), _INDENTED),
                call=_json_call(
                    "parameters", name="tool_name", first=(Maybe((*_field("tool_call_id", Blank.INDEX), *_COMMA)),)
                ),
                between=(NONE, Text(","), _INDENTED),
                end=(LINE, Text("]"), LINE, Mark("<|END_ACTION|>")),
            ),
        )
    ),
    "functiongemma": _gemma("<start_function_call>", "<end_function_call>", "<escape>"),
    "gemma4": _gemma("<|tool_call>", "<tool_call|>", '<|"|>'),
}
# What the field calls them besides.
CALL_NAMES: dict[str, str] = {name: name for name in CALLS} | {
    "qwen": "hermes",
    "qwen3": "hermes",
    "qwen25": "hermes",
    "granite4": "hermes",
    "qwen3_xml": "qwen3_coder",
    "llama": "llama3_json",
    "llama3": "llama3_json",
    "llama4_json": "llama3_json",
    "llama4_pythonic": "pythonic",
    "gpt_oss": "openai",
    "gpt-oss": "openai",
    "glm47": "glm45",
    "minimax": "minimax_m2",
    "granite-20b-fc": "granite",
    "phi4": "phi4_mini_json",
    "cohere_command3": "cohere",
}
REASONING_NAMES: dict[str, str] = {name: name for name in REASONING} | {
    "deepseek_r1": "think",
    "deepseek_v3": "think",
    "qwen3": "think",
    "glm45": "think",
    "minimax_m2": "think",
    "kimi_k2": "think",
    "olmo3": "think",
    "step3": "think",
    "ernie45": "think",
    "openai_gptoss": "openai",
    "gpt_oss": "openai",
    "hunyuan_a13b": "hunyuan",
    "cohere_command3": "cohere",
}
# For models of which nothing is known, whose prompts describe it.
PLAIN = Format(name="plain", calls=CALLS["hermes"])
# What of a chat template tells a family, the surest first: all of the marks stand in it.
CALL_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("openai", ("<|channel|>", "<|message|>")),
    ("glm45", ("<arg_key>", "<arg_value>")),
    ("seed_oss", ("<seed:tool_call>", "<function=")),
    ("qwen3_coder", ("<function=", "<parameter=")),
    ("minimax_m2", ("<minimax:tool_call>", "<invoke")),
    ("kimi_k2", ("<|tool_call_begin|>", "<|tool_call_argument_begin|>")),
    ("deepseek_v3", ("<｜tool▁calls▁begin｜>", "```json")),
    ("deepseek_v31", ("<｜tool▁calls▁begin｜>",)),
    ("functiongemma", ("<start_function_call>",)),
    ("gemma4", ("<|tool_call>", "call:")),
    ("cohere", ("<|START_ACTION|>",)),
    ("lfm2", ("<|tool_call_start|>",)),
    ("olmo3", ("<function_calls>",)),
    ("mistral", ("[TOOL_CALLS]",)),
    ("phi4_mini_json", ("<|tool_call|>", "<|/tool_call|>")),
    ("phi4_mini_json", ("functools[",)),
    ("granite", ("<|tool_call|>",)),
    ("hermes", ("<tool_call>",)),
    ("pythonic", ("[func_name1(",)),
    ("llama3_json", ("<|python_tag|>",)),
    ("llama3_json", ('"parameters"', "ipython")),
)
REASONING_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("openai", ("<|channel|>", "analysis")),
    ("gemma4", ("<|channel>", "thought")),
    ("seed_oss", ("<seed:think>",)),
    ("mistral", ("[THINK]",)),
    ("cohere", ("<|START_THINKING|>",)),
    ("granite", ("Here is my thought process:",)),
    ("exaone_deep", ("<thought>",)),
    ("hunyuan", ("<think>", "<answer>")),
    ("think", ("</think>",)),
)
