"""Conversations as OpenAI's API has them, checked before a chat template sees them: roles, contents, calls of tools and
what came of them. What clients send back of an earlier answer is taken where it asks for nothing."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from quire_engine.errors import InvalidParameter
from quire_engine.text.images import PromptImage

MAX_TEXT = 1 << 24  # characters
MAX_ROLE = 64  # characters
MAX_CALLS = 128  # of one message
MAX_NAME = 256  # characters of a tool's name or a call's id
REASONING = ("reasoning_content", "thinking", "reasoning")  # names that a past turn's reasoning goes by
_READ = {"role", "content", "name", "tool_calls", "tool_call_id", *REASONING}
_LISTS = {"tool_calls", "annotations", "reasoning_details"}  # which say nothing where they are empty
_SAYS_NOTHING = {  # but what is said elsewhere as well
    "cache_control",  # every prefix is cached
    "parsed",  # the content, as the openai package reads it
    "provider_specific_fields",  # the other fields, as litellm keeps them
}
_OF_CALLS = {"id", "type", "function"}
_OF_FUNCTIONS = {"name", "arguments"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One call of a past turn."""

    id: str
    name: str
    arguments: dict[str, Any]
    text: str  # the arguments as they were sent

    def written(self, arguments: Any) -> dict[str, Any]:
        """As OpenAI's API has it, with the arguments in whichever form."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": arguments}}


def conversation(messages: Any, *, also_read: frozenset[str] = frozenset()) -> list[dict[str, Any]]:
    """Each message without what is null or says nothing. `tool_calls` are Calls, in the order of which the results
    behind them stand; a result without a name has that of its tool. `also_read`: further fields that may be there.

    Raises InvalidParameter for the first thing that is wrong.
    """
    if not isinstance(messages, list):
        raise InvalidParameter("messages must be a list of objects with role and content", "messages")
    calls: dict[str, Call] = {}
    places: dict[str, int] = {}  # of the calls of the last turn that has some
    turns: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []  # since the last turn that is none
    for place, message in enumerate(messages):
        turn = _without_nulls(message, place, also_read)
        if turn["role"] == "tool":
            if has_images(turn.get("content")):
                _refuse(f"message {place} is what a tool gave and holds an image; put images into messages of a user")
            call = _answered(turn, place, calls)
            results.append({"name": call.name} | turn)
            continue
        turns += _in_order(results, places)
        results = []
        if "tool_calls" in turn:
            turn["tool_calls"] = made = list(_calls(turn["tool_calls"], place))
            calls |= {call.id: call for call in made}
            places = {call.id: number for number, call in enumerate(made)}
            if not turn.get("content"):
                turn.pop("content", None)
        turns.append(turn)
    return turns + _in_order(results, places)


def content_of(message: Any, place: int) -> str | list[dict[str, Any]] | None:
    """The content of one message, which must have a role: a text, or parts that are texts and images. What else parts
    hold asks for nothing here. Raises InvalidParameter."""
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str) or len(role) > MAX_ROLE:
        _refuse(f"message {place} has no role; give an object with role and content")
    content, what = message.get("content"), f"the content of message {place}"
    if isinstance(content, list):
        return [_part(part, f"part {number} of message {place}") for number, part in enumerate(content)]
    return None if content is None else _checked(content, what)


def image_url(url: str) -> dict[str, Any]:
    """A part that names an image."""
    return {"type": "image_url", "image_url": {"url": url}}


def has_images(content: Any) -> bool:
    """Whether a checked content has some."""
    return isinstance(content, list) and any(part["type"] != "text" for part in content)


def text_of(content: Any) -> str:
    """A checked content as one text."""
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content if part["type"] == "text")
    return content or ""


def _part(part: Any, what: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image" and isinstance(part.get("image"), PromptImage):
        return {"type": "image", "image": part["image"]}
    if kind not in ("text", "image_url"):
        _refuse(f"{what}: parts of type {_short(kind)} are not supported; 'text' and 'image_url' are")
    for name in part:
        if name not in ("type", kind, "cache_control"):
            _refuse(f"{what}: a part of type {kind!r} has no {name!s:.60}; leave it out")
    if kind == "text":
        return {"type": "text", "text": _checked(part.get("text"), what)}
    return image_url(_url(part.get("image_url"), what))


def _url(given: Any, what: str) -> str:
    if not isinstance(given, dict) or not isinstance(url := given.get("url"), str):
        _refuse(f'{what}: image_url must be an object with a url: {{"url": "data:image/png;base64,..."}}')
    for name, value in given.items():
        if name not in ("url", "detail"):
            _refuse(f"{what}: image_url has no {name!s:.60}; leave it out")
        if name == "detail" and value not in (None, "auto", "low", "high"):  # the model's processor decides
            _refuse(f"{what}: detail is {value!r:.40}; it can be auto, low or high")
    return str(url)


def _checked(value: Any, what: str) -> str:
    if not isinstance(value, str):
        _refuse(f"{what}: it must be a text")
    if len(value) > MAX_TEXT:
        _refuse(f"{what}: it has {len(value)} characters; at most {MAX_TEXT} are read")
    return value


def _without_nulls(message: Any, place: int, also_read: frozenset[str]) -> dict[str, Any]:
    content = content_of(message, place)
    turn = {}
    for name, value in message.items():
        if value is None or name in _SAYS_NOTHING or (name in _LISTS and value == []):
            continue
        if name == "function_call":
            _refuse(f"message {place} holds function_call, which is deprecated; send tool_calls")
        if name == "refusal":
            _refuse(f"message {place} holds a refusal, which chat templates do not read; send it as content")
        if name not in _READ and name not in also_read:
            _refuse(f"message {place} holds {name!s:.60}, which the chat template does not read; leave it out")
        if name == "tool_calls" and message["role"] != "assistant":
            _refuse(f"message {place} holds tool_calls; only messages of role 'assistant' may")
        if name == "tool_call_id" and message["role"] != "tool":
            _refuse(f"message {place} holds tool_call_id; only messages of role 'tool' may")
        if name == "name" or name in REASONING:
            _checked(value, f"{name} of message {place}")
        turn[name] = content if name == "content" else value
    return turn


def _answered(turn: Mapping[str, Any], place: int, calls: Mapping[str, Call]) -> Call:
    """The call that a tool's message answers."""
    given = turn.get("tool_call_id")
    if not isinstance(given, str):
        _refuse(f"message {place} has no tool_call_id; give the id of the call that it answers")
    if given not in calls:
        _refuse(f"message {place} has tool_call_id {given[:60]!r}, which is the id of no call before it")
    return calls[given]


def _in_order(results: list[dict[str, Any]], places: Mapping[str, int]) -> list[dict[str, Any]]:
    """As their calls are: many templates write no ids, and models tell results apart by where they stand."""
    return sorted(results, key=lambda turn: places.get(turn["tool_call_id"], -1))


def _calls(given: Any, place: int) -> Iterator[Call]:
    if not isinstance(given, list):
        _refuse(f"tool_calls of message {place} must be a list of calls")
    if len(given) > MAX_CALLS:
        _refuse(f"message {place} has {len(given)} tool_calls; at most {MAX_CALLS} are read")
    seen: set[str] = set()
    for number, one in enumerate(given):
        call = _call(one, f"tool_calls[{number}] of message {place}")
        if call.id in seen:
            _refuse(f"message {place} has two calls of id {call.id[:60]!r}; give each its own")
        seen.add(call.id)
        yield call


def _call(given: Any, what: str) -> Call:
    if not isinstance(given, dict):
        _refuse(f"{what} must be an object with id, type and function")
    if given.get("type", "function") != "function":
        _refuse(f"{what} is of type {_short(given['type'])}; only 'function' is supported")
    function = given.get("function")
    if not isinstance(function, dict):
        _refuse(f"{what} has no function; give an object with name and arguments")
    _check_names(given, _OF_CALLS | {"index"}, what)  # a place in a stream, which whoever joins its pieces may keep
    _check_names(function, _OF_FUNCTIONS | {"parsed_arguments"}, f"the function of {what}")
    for value, name in ((given.get("id"), "id"), (function.get("name"), "function.name")):
        if not isinstance(value, str) or not 1 <= len(value) <= MAX_NAME:
            _refuse(f"{what}: {name} must be a text of 1 to {MAX_NAME} characters")
    arguments = function.get("arguments")
    try:
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        text = text or "{}"  # as some clients write none
        found = json.loads(text, parse_constant=_no_json)
        json.dumps(found, ensure_ascii=False, allow_nan=False).encode()  # no half of a character, and no 1e999
    except (TypeError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        _refuse(f"{what}: function.arguments must be the JSON text of an object ('{{}}' for none)")
    return Call(id=given["id"], name=function["name"], arguments=found, text=text)


def _check_names(given: Mapping[str, Any], known: set[str], what: str) -> None:
    for name, value in given.items():
        if value is not None and name not in known:
            _refuse(f"{what} has no {name!s:.60}; leave it out")


def _short(kind: Any) -> str:
    return f"{kind[:40]!r}" if isinstance(kind, str) else f"'{type(kind).__name__}'"


def _no_json(constant: str) -> NoReturn:
    raise ValueError(constant)


def _refuse(message: str) -> NoReturn:
    raise InvalidParameter(message, "messages")
