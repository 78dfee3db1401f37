"""The tools that a request offers, as OpenAI's API has them."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from quire_engine.errors import InvalidParameter
from quire_engine.guidance.schemas import closed

MAX_TOOLS = 128
MAX_NAME = 64
MAX_SCHEMA_SIZE = 1 << 18  # characters of JSON, of all tools together
MAX_SCHEMA_DEPTH = 64
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_MAY_BE_NULL = {"type", "properties", "required"}  # as some clients write what they leave out
_KEYS = {"name", "description", "parameters", "strict"}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. `parameters`: the JSON schema of its arguments, of an object."""

    name: str
    description: str
    parameters: dict[str, Any]
    strict: bool


def tools_of(raw: Any) -> list[Tool]:
    """Tools from the `tools` of a request. Raises InvalidParameter that names `tools`."""
    if raw is None:
        return []
    if not isinstance(raw, list):
        raise _refused(f"must be a list of functions, not {type(raw).__name__}")
    if len(raw) > MAX_TOOLS:
        raise _refused(f"has {len(raw)} functions; at most {MAX_TOOLS} are taken")
    _check_size(raw)
    tools = [_tool(one, f"tools[{place}]") for place, one in enumerate(raw)]
    seen: set[str] = set()
    for tool in tools:
        if tool.name in seen:
            raise _refused(f"has two functions named {tool.name!r}; names must differ")
        seen.add(tool.name)
    return tools


def _tool(raw: Any, where: str) -> Tool:
    if not isinstance(raw, dict) or raw.get("type") != "function" or not isinstance(raw.get("function"), dict):
        raise _refused(f'needs {{"type": "function", "function": {{...}}}} at {where}; other kinds are not supported')
    if unknown := sorted(raw.keys() - {"type", "function", "cache_control"}):  # every prefix is cached
        raise _refused(f"has {str(unknown[0])[:60]!r} at {where}, which holds type and function")
    function: dict[str, Any] = raw["function"]
    if unknown := sorted(function.keys() - _KEYS):
        raise _refused(f"has {unknown[0][:60]!r} at {where}.function, which holds {', '.join(sorted(_KEYS))}")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _refused(
            f"needs a name at {where}.function of letters, digits, _ and -, at most {MAX_NAME} of them, "
            f"not {name!r:.80}"
        )
    description, strict = function.get("description"), function.get("strict")
    if not isinstance(description, str | None):
        raise _refused(f"needs a text as {where}.function.description, not {type(description).__name__}")
    if not isinstance(strict, bool | None):
        raise _refused(f"needs true or false as {where}.function.strict, not {type(strict).__name__}")
    return Tool(name, description or "", _parameters(function.get("parameters"), where), bool(strict))


def _parameters(raw: Any, where: str) -> dict[str, Any]:
    if raw is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(raw, dict):
        raise _refused(f"needs a JSON schema as {where}.function.parameters, not {type(raw).__name__}")
    raw = {key: value for key, value in raw.items() if value is not None or key not in _MAY_BE_NULL}
    if raw.get("type", "object") != "object":
        raise _refused(f'needs "type": "object" in {where}.function.parameters, not {raw["type"]!r:.40}')
    for key, kind, called in (("properties", dict, "an object"), ("required", list, "a list of names")):
        if key in raw and not isinstance(raw[key], kind):
            raise _refused(f"needs {called} as {where}.function.parameters.{key}, not {type(raw[key]).__name__}")
    if not all(isinstance(name, str) for name in raw.get("required", [])):
        raise _refused(f"needs a list of names as {where}.function.parameters.required")
    return {"type": "object"} | closed(raw, "tools")


def _check_size(raw: list[Any]) -> None:
    if any(depth > MAX_SCHEMA_DEPTH for depth in _depths(raw)):
        raise _refused(f"is nested more than {MAX_SCHEMA_DEPTH} deep")
    try:
        size = len(json.dumps(raw, ensure_ascii=False, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise _refused(f"is not JSON ({error})") from error
    if size > MAX_SCHEMA_SIZE:
        raise _refused(f"has {size} characters of JSON; at most {MAX_SCHEMA_SIZE} are taken")


def _depths(value: Any) -> Iterator[int]:
    """How deep each value lies, none of them deeper than one more than is taken."""
    waiting = [(value, 1)]
    while waiting:
        one, depth = waiting.pop()
        yield depth
        if depth <= MAX_SCHEMA_DEPTH and isinstance(one, dict | list):
            waiting += [(inner, depth + 1) for inner in (one.values() if isinstance(one, dict) else one)]


def _refused(problem: str) -> InvalidParameter:
    return InvalidParameter(f"tools {problem}", "tools")
