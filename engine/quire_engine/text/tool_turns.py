"""Tools, calls of past turns and what came of them, as a chat template wants them: in its own fields, or as plain text
where it has none."""

import hashlib
import json
import re
import string
from dataclasses import replace
from typing import Any

from quire_engine.text.messages import REASONING, Call, has_images, text_of
from quire_engine.text.tool_facts import ToolFacts

Turns = list[dict[str, Any]]
_SHORT_ID = re.compile("[a-zA-Z0-9]{9}")
_DIGITS = string.digits + string.ascii_letters
_DESCRIPTION = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def for_template(turns: Turns, facts: ToolFacts, described: list[dict[str, Any]] | None) -> Turns:
    """A checked conversation in the template's own fields, as far as it has them. `described`: tools that it does not
    know, which are described in words, and called in words then."""
    if not any("tool_calls" in turn or turn["role"] == "tool" for turn in turns):
        return _with_description(turns, described, facts) if described else turns
    native = facts.writes_calls and not described
    if native and facts.names_by_id:
        turns = _named_by_id(turns)
    fitted: Turns = []
    answered = False  # whether the last turn is a user's, made of results
    for turn, results in _exchanges(turns, facts, native=native):
        if answered and turn["role"] == "user":
            fitted[-1] = turn | {"content": _joined("\n", fitted[-1]["content"], turn.get("content"))}
        else:
            fitted.append(turn)
        answered = False
        if facts.writes_results if turn.get("tool_calls") else facts.writes_lone_results:
            fitted += results
        elif results:
            text = "\n".join(f"<tool_response>\n{text_of(one.get('content'))}\n</tool_response>" for one in results)
            if turn["role"] == "user":
                fitted[-1] = _longer(fitted[-1], text)
            else:
                fitted.append({"role": "user", "content": text})
                answered = True
    return _with_description(fitted, described, facts) if described else fitted


def _longer(turn: dict[str, Any], text: str) -> dict[str, Any]:
    return turn | {"content": _joined("\n", turn.get("content"), text)}


def _joined(between: str, first: Any, second: Any) -> Any:
    """Two contents as one: a text, or parts where there are images."""
    if not (has_images(first) or has_images(second)):
        return f"{text_of(first)}{between}{text_of(second)}"
    parts: list[dict[str, Any]] = []
    for content in (first, [{"type": "text", "text": between}], second):
        parts += content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
    return parts


def _exchanges(turns: Turns, facts: ToolFacts, *, native: bool) -> list[tuple[dict[str, Any], Turns]]:
    """Each turn with the results that follow it, calls in the form that the template gets. No conversation begins with
    a result."""
    pairs: list[tuple[dict[str, Any], Turns]] = []
    for turn in turns:
        if turn["role"] == "tool":
            pairs[-1][1].append(turn | {"tool_call_id": _id(turn["tool_call_id"], facts)})
        else:
            pairs.append((turn, []))
    found: list[tuple[dict[str, Any], Turns]] = []
    for turn, results in pairs:
        if "tool_calls" not in turn:
            found.append((turn, results))
        elif native:
            found += _native(turn, results, facts)
        else:
            texts = [text_of(turn.get("content")), *map(_plain, turn["tool_calls"])]
            rest = {name: value for name, value in turn.items() if name != "tool_calls"}
            found.append((rest | {"content": "\n".join(filter(None, texts))}, results))
    return found


def _native(turn: dict[str, Any], results: Turns, facts: ToolFacts) -> list[tuple[dict[str, Any], Turns]]:
    """One turn of calls, or several where the template would lose what stands beside the first call."""
    calls: list[Call] = turn["tool_calls"]
    pairs: list[tuple[dict[str, Any], Turns]] = []
    apart = not facts.takes_content or (not facts.takes_thoughts and any(name in turn for name in REASONING))
    if turn.get("content") and apart:
        pairs.append(({"role": "assistant", "content": turn["content"]}, []))
        turn = {name: value for name, value in turn.items() if name != "content"}
    if not facts.takes_null:
        turn = {"content": ""} | turn
    for group in [calls] if facts.takes_many else [[call] for call in calls]:
        written = [call.written(call.text if facts.takes_text else call.arguments) for call in group]
        for one in written:
            one["id"] = _id(one["id"], facts)
        others = {_id(call.id, facts) for call in calls} - {one["id"] for one in written}
        answers = [result for result in results if result["tool_call_id"] not in others]
        results = [result for result in results if result["tool_call_id"] in others]
        pairs.append((turn | {"tool_calls": written}, answers))
        turn = {"role": "assistant"} if facts.takes_null else {"role": "assistant", "content": ""}
    return pairs


def _named_by_id(turns: Turns) -> Turns:
    """With ids as Kimi K2 was trained to write and read them."""
    calls = [call for turn in turns for call in turn.get("tool_calls", ())]
    ids = {call.id: f"functions.{call.name}:{place}" for place, call in enumerate(calls)}
    found: Turns = []
    for turn in turns:
        if "tool_calls" in turn:
            turn = turn | {"tool_calls": [replace(call, id=ids[call.id]) for call in turn["tool_calls"]]}
        elif turn["role"] == "tool":
            turn = turn | {"tool_call_id": ids[turn["tool_call_id"]]}
        found.append(turn)
    return found


def _id(given: str, facts: ToolFacts) -> str:
    """As the template takes it. It follows from the caller's alone, so that a conversation's next prompt begins as its
    last one did."""
    if facts.takes_any_id or _SHORT_ID.fullmatch(given):
        return given
    number = int.from_bytes(hashlib.sha256(given.encode(errors="surrogatepass")).digest())
    return "".join(_DIGITS[number // len(_DIGITS) ** place % len(_DIGITS)] for place in range(9))


def _plain(call: Call) -> str:
    written = json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)
    return f"<tool_call>\n{written}\n</tool_call>"


def _with_description(turns: Turns, tools: list[dict[str, Any]], facts: ToolFacts) -> Turns:
    """In the system prompt, or before what the first user says where there is no place for one."""
    text = _DESCRIPTION.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    roles = ("system", "developer") if facts.writes_system else ("user",)
    for place, turn in enumerate(turns):
        if turn["role"] in roles:
            given = turn.get("content")
            pair = (given, text) if facts.writes_system else (text, given)
            content = _joined("\n\n", *pair) if given else text
            return [*turns[:place], turn | {"content": content}, *turns[place + 1 :]]
    return [{"role": roles[0], "content": text}, *turns]
