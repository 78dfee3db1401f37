"""What a JSON schema says about a value of which only the text is known."""

import json
import re
from typing import Any

from quire_engine.guidance.schemas import rewritten

TYPES = frozenset({"string", "integer", "number", "boolean", "null", "array", "object"})
_SURROGATES = re.compile("[\ud800-\udfff]")
DEFINITIONS = ("$defs", "definitions")
MAX_KEY = 256  # characters of an argument's name
NOTES = frozenset({"description", "title", "default", "examples", "$comment", "deprecated", "$schema", "$id"})
_MAX_VALUES = 10_000
_MAX_DEPTH = 128  # of schemas within schemas, references among them
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}


def types_of(
    schema: Any, root: dict[str, Any], known: dict[str, frozenset[str]] | None = None, depth: int = 0
) -> frozenset[str]:
    """The types that a schema allows; all of them where it does not say, or is too deep. `root`: what its references
    refer to; `known`: what those allow, as far as that is known."""
    if not isinstance(schema, dict) or depth > _MAX_DEPTH:
        return TYPES
    known = {} if known is None else known
    allowed = TYPES
    if isinstance(reference := schema.get("$ref"), str):
        if reference not in known:
            known[reference] = TYPES  # where it refers to itself
            known[reference] = types_of(referred(reference, root), root, known, depth + 1)
        allowed &= known[reference]
    if (kind := schema.get("type")) is not None:
        kinds = frozenset(one for one in (kind if isinstance(kind, list) else [kind]) if isinstance(one, str))
        allowed &= kinds | ({"integer"} if "number" in kinds else set())
    if isinstance(values := schema.get("enum"), list):
        allowed &= frozenset(type_of(value) for value in values)
    if "const" in schema:
        allowed &= {type_of(schema["const"])}
    for key in ("anyOf", "oneOf"):
        if isinstance(options := schema.get(key), list):
            allowed &= frozenset().union(*(types_of(one, root, known, depth + 1) for one in options))
    if isinstance(options := schema.get("allOf"), list):
        for one in options:
            allowed &= types_of(one, root, known, depth + 1)
    return allowed


def referred(reference: str, root: dict[str, Any]) -> Any:
    """What a reference within a schema refers to; {} (anything) for what is not there."""
    if not reference.startswith("#"):
        return {}
    at: Any = root
    for step in reference[1:].split("/")[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        if not isinstance(at, dict) or key not in at:
            return {}
        at = at[key]
    return at


def unwrapped(schema: Any) -> Any:
    """What stands alone in an allOf, as some write a reference that they have something to say about."""
    while isinstance(schema, dict) and schema.keys() - NOTES == {"allOf"}:
        inner = schema["allOf"]
        if not isinstance(inner, list) or len(inner) != 1:
            break
        schema = inner[0]
    return schema


def resolved(schema: Any, root: dict[str, Any]) -> Any:
    """What a schema refers to that says nothing else."""
    for _ in range(_MAX_DEPTH):
        schema = unwrapped(schema)
        if not isinstance(schema, dict) or schema.keys() - NOTES != {"$ref"}:
            break
        schema = referred(str(schema["$ref"]), root)
    return schema


def values_of(schema: Any, root: dict[str, Any]) -> list[Any] | None:
    """The values that a schema names; None where it allows others. References and one anyOf are followed."""
    schema = resolved(schema, root)
    options = schema.get("anyOf") if isinstance(schema, dict) and "enum" not in schema else None
    found: list[Any] = []
    for one in options if isinstance(options, list) and options else [schema]:
        one = resolved(one, root)
        named = isinstance(one, dict) and ("enum" in one or "const" in one or one.get("type") == "null")
        if not named or len(found) > _MAX_VALUES:
            return None
        found += one["enum"] if isinstance(one.get("enum"), list) else [one.get("const")]
    return found


def standing_alone(schema: Any, root: dict[str, Any]) -> dict[str, Any]:
    """A part of a schema, with the definitions that it refers to: or with all of the root, where it refers to more."""
    part = dict(schema) if isinstance(schema, dict) else {}
    found: dict[str, Any] = {}
    waiting, seen = [schema], set[str]()
    while waiting:
        one = waiting.pop()
        if isinstance(one, list):
            waiting += one
        if not isinstance(one, dict):
            continue
        waiting += one.values()
        reference = one.get("$ref")
        if not isinstance(reference, str) or reference in seen:
            continue
        seen.add(reference)
        _, where, name = (*reference.split("/", 2), "", "")[:3]
        key = name.replace("~1", "/").replace("~0", "~")
        if where not in DEFINITIONS or not isinstance(root.get(where), dict) or key not in root[where]:
            return rewritten(part, _within_root) | {"$defs": {"root": rewritten(root, _within_root)}}
        found.setdefault(where, {})[key] = root[where][key]
        waiting.append(root[where][key])
    return part | found


def _within_root(schema: dict[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref")
    if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
        return schema
    return schema | {"$ref": "#/$defs/root" + reference[1:]}


def type_of(value: Any) -> str:
    """A JSON value's type; of numbers, the narrower one."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    if isinstance(value, int | float):
        return "integer" if isinstance(value, int) or value.is_integer() else "number"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"


def typed(text: str, types: frozenset[str]) -> str:
    """A bare value as JSON: of one of these types if it is one, and else a string."""
    bare = text.strip()
    written = _PYTHON_WORDS.get(bare, bare)
    try:
        value = json.loads(written, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return dumped(text)
    return written if type_of(value) in types else dumped(text)


def dumped(text: str) -> str:
    """A text as a JSON string."""
    return '"' + escaped(text) + '"'


def escaped(text: str) -> str:
    """The same without its quotes."""
    return _SURROGATES.sub(_escape, json.dumps(text, ensure_ascii=False)[1:-1])


def _escape(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is no JSON")
