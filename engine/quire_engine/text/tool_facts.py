"""What a chat template does with tools, with calls of past turns and with what came of them: seen once per template, in
what it makes of small conversations, for templates are programs and no syntax tells this."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from quire_engine.text.messages import Call

Turns = list[dict[str, Any]]
Tools = list[dict[str, Any]]
Attempt = Callable[[Turns, Tools | None], str]  # a conversation as rendered; nothing where the template refuses it

_SYSTEM = {"role": "system", "content": "systemprobe"}
_USER = {"role": "user", "content": "userprobe"}
_TEXT = "textprobe"
_THOUGHT = "thoughtprobe"
_KEY = {"type": "string", "description": "A key."}
_PARAMETERS = {"type": "object", "properties": {"key_probe": _KEY}, "required": ["key_probe"]}
PROBE = "name_probe"  # a tool, which takes `key_probe`
_FUNCTION = {"name": PROBE, "description": "Probes.", "parameters": _PARAMETERS}
_TOOLS: Tools = [{"type": "function", "function": _FUNCTION}]


@dataclass(frozen=True, kw_only=True)
class ToolFacts:
    """`knows_tools`: it writes the tools that it is given, with a system prompt or without one."""

    knows_tools: bool
    writes_calls: bool  # those of past turns; the other facts about calls mean nothing where it does not
    takes_text: bool = False  # arguments as JSON text, where others want an object
    takes_null: bool = True  # the content of a turn of calls alone
    takes_any_id: bool = True  # others want 9 letters and digits
    names_by_id: bool = False  # a past call's tool is told by its id alone, as functions.NAME:NUMBER
    takes_many: bool = True  # calls in one turn; others want turns of one call each, or lose the rest
    takes_content: bool = True  # beside calls; others lose the calls then, and want two turns
    takes_thoughts: bool = True  # beside calls and content; others refuse them then
    writes_results: bool = False  # turns of the role `tool`, behind calls
    writes_lone_results: bool = False  # such turns behind an answer that has no calls, or has them in its text
    writes_system: bool = False  # system prompts
    example: str = ""  # a conversation that ends with a call of PROBE, and maybe with what comes after it

    @staticmethod
    def of(attempt: Attempt) -> "ToolFacts":
        """Renders a few dozen short conversations at most."""
        openings = [found for start in ([_USER], [_SYSTEM, _USER]) if (found := attempt(start, _TOOLS))]
        tools = _TOOLS if openings and all(PROBE in found for found in openings) else None
        facts = ToolFacts(
            knows_tools=tools is not None,
            writes_calls=False,
            writes_lone_results=_has(
                attempt([_USER, _answer(), _result(_call(1)), _result(_call(2))], tools), _result_of(1), _result_of(2)
            ),
            writes_system=_has(attempt([_SYSTEM, _USER], None), _SYSTEM["content"]),
        )
        return next(_with_calls(facts, attempt, tools), facts)


def _with_calls(facts: ToolFacts, attempt: Attempt, tools: Tools | None) -> Iterator[ToolFacts]:
    """The ways in which the template writes a call, the usual ones first."""
    yes_or_no = (True, False)
    ways = product(("result", "nothing", "question"), yes_or_no, (False, True), yes_or_no)
    for after, any_id, text, null in ways:
        form = replace(facts, writes_calls=True, takes_any_id=any_id, takes_text=text, takes_null=null)
        calls = [_call(number, short=not any_id) for number in (1, 2)]
        ends = {"result": [_result(calls[0])], "nothing": [], "question": [_USER]}
        found = attempt([_USER, _turn(form, calls[0]), *ends[after]], tools)
        if not _has(found, _value(1)) or str(calls[0].arguments) in found:  # an object as Python writes it
            continue
        behind = [[_result(call)] if after == "result" else [] for call in calls]
        both, each = _turn(form, *calls), [_turn(form, call) for call in calls]
        many = attempt([_USER, both, *behind[0], *behind[1]], tools)
        apart = attempt([_USER, each[0], *behind[0], each[1], *behind[1]], tools)
        said, thought = {"content": _TEXT}, {"reasoning_content": _THOUGHT}
        beside = attempt([_USER, each[0] | said, *behind[0]], tools)
        before = attempt([_USER, _answer(), each[0], *behind[0]], tools)
        all_beside = attempt([_USER, each[0] | said | thought, *behind[0]], tools)
        thought_behind = attempt([_USER, _answer(), each[0] | thought, *behind[0]], tools)
        without_tools = attempt([_USER, each[0], *behind[0]], None)
        yield replace(
            form,
            example=found,
            names_by_id=_has(without_tools, calls[0].id) and PROBE not in without_tools,
            writes_results=_has(found, _result_of(1)),
            takes_many=_has(many, _value(1), _value(2)) or not _has(apart, _value(1), _value(2)),
            takes_content=_has(beside, _value(1)) or not _has(before, _TEXT, _value(1)),
            takes_thoughts=_has(all_beside, _value(1)) or not _has(thought_behind, _TEXT, _value(1)),
        )


def _has(rendered: str, *texts: str) -> bool:
    return all(text in rendered for text in texts)


def _value(number: int) -> str:
    return f"value_probe_{number}"


def _result_of(number: int) -> str:
    return f"result_probe_{number}"


def _call(number: int, *, short: bool = False) -> Call:
    identity = f"{number}aB3aB3aB" if short else f"call_{number}{'aB3' * 7}aB"
    arguments = {"key_probe": _value(number)}
    return Call(id=identity, name=PROBE, arguments=arguments, text=json.dumps(arguments))


def _answer() -> dict[str, Any]:
    return {"role": "assistant", "content": _TEXT}


def _turn(form: ToolFacts, *calls: Call) -> dict[str, Any]:
    written = [call.written(call.text if form.takes_text else call.arguments) for call in calls]
    return {"role": "assistant", "content": None if form.takes_null else "", "tool_calls": written}


def _result(call: Call) -> dict[str, Any]:
    number = 1 if _value(1) in call.text else 2
    return {"role": "tool", "name": call.name, "tool_call_id": call.id, "content": _result_of(number)}
