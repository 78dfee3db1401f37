"""How each family writes reasoning and calls: one literal table each, by the names that the field knows them by."""

from dataclasses import dataclass

from quire_engine.text.formats.facts import (
    Blank,
    Call,
    Calls,
    Format,
    Json,
    Mark,
    Pieces,
    Reasoning,
    Section,
    Space,
    Text,
)


def _json_call(name: str, arguments: str) -> Call:
    """A call that is a JSON object of a name and arguments."""
    return Call(
        before=(
            Text("{"),
            Space(""),
            Text(f'"{name}"'),
            Space(""),
            Text(":"),
            Space(),
            Text('"'),
            Blank.NAME,
            Text('"'),
            Space(""),
            Text(","),
            Space(),
            Text(f'"{arguments}"'),
            Space(""),
            Text(":"),
            Space(),
        ),
        arguments=Json(),
        after=(Space(""), Text("}")),
    )


def _tags(begin: str, end: str) -> Reasoning:
    return Reasoning(begin=(Mark(begin),), end=(Space("\n"), Mark(end)))


_LINE: Pieces = (Space("\n"),)

REASONING: dict[str, Reasoning] = {
    "think": _tags("<think>", "</think>"),
}
CALLS: dict[str, Calls] = {
    "hermes": Calls(
        sections=(
            Section(
                begin=(*_LINE, Mark("<tool_call>"), *_LINE),
                call=_json_call("name", "arguments"),
                end=(*_LINE, Mark("</tool_call>")),
                repeats=True,
                apart=(Text("\n"),),
            ),
        )
    ),
}

CALL_NAMES: dict[str, str] = {name: name for name in CALLS} | {
    "qwen": "hermes",
    "qwen3": "hermes",
    "granite4": "hermes",
}
REASONING_NAMES: dict[str, str] = {name: name for name in REASONING} | {"deepseek_r1": "think", "qwen3": "think"}
PLAIN = Format(name="plain", reasoning=REASONING["think"], calls=CALLS["hermes"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Sign:
    """What of a chat template or vocabulary tells a family."""

    marks: tuple[str, ...]
    calls: str = ""
    reasoning: str = ""


SIGNS: tuple[Sign, ...] = (
    Sign(marks=("<tool_call>", '"arguments"'), calls="hermes"),
    Sign(marks=("</think>",), reasoning="think"),
)
