"""A tool's schema as rules of a grammar: as JSON, as pairs between tags, as literals.

What a strict schema asks and its format cannot hold to is refused; what another one asks beyond that is passed over.
"""

import json
import re
from dataclasses import replace
from typing import Any

from quire_engine.errors import InvalidParameter
from quire_engine.guidance import grammars
from quire_engine.guidance.schemas import without_patterns
from quire_engine.text.formats.facts import Either, Literals, Mark, Pieces, Tagged, Text
from quire_engine.text.formats.lark import Lark, quoted
from quire_engine.text.formats.schema import (
    MAX_KEY,
    NOTES,
    TYPES,
    referred,
    resolved,
    standing_alone,
    type_of,
    types_of,
    unwrapped,
    values_of,
)
from quire_engine.text.formats.tools import Tool

_WHITESPACE = " "  # in JSON where it may be, as in the templates that models have learnt calls from
_OF_TEXT = NOTES | {"type", "enum", "const", "anyOf"}
_OF_LITERALS = _OF_TEXT | {"properties", "required", "items", "additionalProperties", "$ref", "$defs", "definitions"}
_NAME = re.compile(r"[A-Za-z_][\w.-]*", re.ASCII)
_MOST_PAIRS = 32  # of an object that names none
_MAX_DEPTH = 24
_MAX_SIZE = 1 << 22  # characters of a grammar: each value has the definitions that it refers to


def kept_to(tool: Tool) -> Tool:
    """The tool with a schema that llguidance can hold to. Raises InvalidParameter where there is none."""
    problem = _problem(tool.parameters, tool)
    if problem and not tool.strict:
        tool = replace(tool, parameters=without_patterns(tool.parameters))
        problem = _problem(tool.parameters, tool)
    if problem:
        raise _refused(tool, problem)
    return tool


def json_rule(tool: Tool, schema: Any) -> str:
    """A JSON value of this schema, the tool's or a part of it."""
    if schema is not tool.parameters:
        schema = standing_alone(schema, tool.parameters)
    return f"%json {json.dumps(_schema(schema, tool)['json_schema'])}"


def _schema(schema: dict[str, Any], tool: Tool) -> dict[str, Any]:
    return grammars.json_schema(schema, parameter="tools", lenient=not tool.strict, whitespace=_WHITESPACE)


def _problem(schema: dict[str, Any], tool: Tool) -> str:
    try:
        return grammars.problem_of(grammars.composed(_schema(schema, tool)))
    except InvalidParameter as error:
        return str(error)


def pair_rules(lark: Lark, style: Tagged, tool: Tool, name: str) -> str:
    """Pairs of a tool's arguments, in the order of its schema."""
    schema = tool.parameters
    properties, required = schema.get("properties", {}), set(schema.get("required", ()))
    _check_required(tool, properties, required)
    others = schema.get("additionalProperties", True)
    if not properties and others is not False:
        pair = lark.sequence(style.key, "/[A-Za-z_][A-Za-z0-9_.-]{0,63}/", style.value)
        return f"({pair} {_bare_value(lark, style, tool, others, f'{name}_any')}){{0,{_MOST_PAIRS}}}"
    pairs: list[str] = []
    for place, (key, inner) in enumerate(properties.items()):
        if len(key) > MAX_KEY or _holds(key, style.value):
            if tool.strict or key in required:
                raise _refused(tool, f"{key[:60]!r} is no name that this model's calls can hold")
            continue
        value = _bare_value(lark, style, tool, inner, f"{name}_{place}")
        pair = lark.rule(f"{name}_pair_{place}", lark.sequence(style.key, (Text(key),), style.value, value))
        if lark.size > _MAX_SIZE:
            raise _refused(tool, "what its properties refer to is too much in all")
        pairs.append(pair if key in required else f"{pair}?")
    return " ".join(pairs)


def _bare_value(lark: Lark, style: Tagged, tool: Tool, schema: Any, name: str) -> str:
    """A value and what closes it."""
    schema = resolved(schema, tool.parameters)
    types = types_of(schema, tool.parameters)
    if "string" not in types:
        return lark.sequence(json_rule(tool, schema), style.close)
    values = values_of(schema, tool.parameters)
    if values is None:
        _check_keys(tool, schema, _OF_TEXT)
        return lark.until(style.close, name)
    spelled = [value if isinstance(value, str) else json.dumps(value) for value in values if type_of(value) in types]
    fitting = [one for one in spelled if not _holds(one, style.close)]
    if not fitting or (tool.strict and len(fitting) < len(spelled)):
        raise _refused(tool, "its enum has what this model's calls cannot hold")
    return lark.sequence(f"({' | '.join(map(quoted, fitting))})", style.close)


def _holds(text: str, delimiter: Pieces) -> bool:
    """Whether a text might be cut off by a delimiter."""
    first = delimiter[0]
    starts = [option[0] for option in first.options] if isinstance(first, Either) else [first]
    return any(isinstance(one, Text | Mark) and one.text in text for one in starts)


class LiteralRules:
    """A schema as literals."""

    def __init__(self, lark: Lark, style: Literals, tool: Tool, name: str) -> None:
        self._lark = lark
        self._style = style
        self._tool = tool
        self._name = name
        self._references: dict[str, str] = {}
        self._count = 0

    def arguments(self) -> str:
        """All of a call."""
        return self._pairs(self._tool.parameters, 0, bare=True)

    def _rule(self, body: str) -> str:
        self._count += 1
        return self._lark.rule(f"{self._name}_{self._count}", body)

    def _pairs(self, schema: dict[str, Any], depth: int, *, bare: bool) -> str:
        """Names and values with commas between them, those that are not required or not."""
        _check_keys(self._tool, schema, _OF_LITERALS)
        properties, required = schema.get("properties", {}), set(schema.get("required", ()))
        _check_required(self._tool, properties, required)
        assign = self._style.assign if bare else ": "
        if not properties:
            others = schema.get("additionalProperties", True)
            if others is False:
                return ""
            key = "/[A-Za-z_][A-Za-z0-9_]{0,63}/" if bare else self._string()
            pair = self._rule(self._lark.sequence(key, (Text(assign),), self._value(others, depth + 1)))
            return f'({pair} ("," " "? {pair}){{0,{_MOST_PAIRS}}})?'
        begun = fresh = ""  # what may follow where a pair has been written, and where none has
        for key, inner in reversed(properties.items()):
            if bare and (len(key) > MAX_KEY or not _NAME.fullmatch(key)):
                if self._tool.strict or key in required:
                    raise _refused(self._tool, f"{key[:60]!r} is no name that this model's calls can hold")
                continue
            name = key if bare else self._spelled(key)
            pair = self._lark.sequence((Text(f"{name}{assign}"),), self._value(inner, depth + 1))
            one = self._rule(f"{pair} {begun}")
            after = self._rule(f'"," " "? {one}')
            if key in required:
                begun, fresh = after, one
            else:
                fresh = self._rule(f"{one} | {fresh}") if fresh else f"({one})?"
                begun = self._rule(f"{after} | {begun}") if begun else f"({after})?"
        return fresh

    def _value(self, schema: Any, depth: int) -> str:
        schema = unwrapped(schema)
        if depth > _MAX_DEPTH or not isinstance(schema, dict):
            return self._any()
        _check_keys(self._tool, schema, _OF_LITERALS)
        if (reference := schema.get("$ref")) is not None:
            return self._referred(str(reference), depth)
        values = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if isinstance(values, list) and values:
            return self._rule(" | ".join(self._literal(value) for value in values))
        if isinstance(options := schema.get("anyOf"), list) and options:
            return self._rule(" | ".join(self._value(option, depth + 1) for option in options))
        types = types_of(schema, self._tool.parameters)
        if types == TYPES and not schema.keys() & {"properties", "items"}:
            return self._any()
        return self._rule(" | ".join(self._of_type(kind, schema, depth) for kind in sorted(types)))

    def _referred(self, reference: str, depth: int) -> str:
        if reference not in self._references:
            self._references[reference] = f"{self._name}_of_{len(self._references)}"
            inner = self._value(referred(reference, self._tool.parameters), depth + 1)
            self._lark.rule(self._references[reference], inner)
        return self._references[reference]

    def _of_type(self, kind: str, schema: dict[str, Any], depth: int) -> str:
        true, false, null = self._style.words
        if kind == "array":
            item = self._value(schema.get("items", True), depth + 1)
            return f'"[" ({item} ("," " "? {item})*)? "]"'
        if kind == "object":
            return f'"{{" {self._pairs(schema, depth, bare=self._style.bare_keys)} "}}"'
        if kind == "string":
            return self._string()
        return {
            "boolean": f"{quoted(true)} | {quoted(false)}",
            "null": quoted(null),
            "integer": "/-?(0|[1-9][0-9]{0,18})/",
            "number": r"/-?(0|[1-9][0-9]{0,18})(\.[0-9]{1,18})?([eE][+-]?[0-9]{1,3})?/",
        }[kind]

    def _string(self) -> str:
        if self._style.quote:
            return self._lark.sequence(self._style.quote, self._lark.until(self._style.quote, f"{self._name}_string"))
        letters = r"([^\"\\\x00-\x1f]|\\[\"'\\nrt])*"
        return f"/\"{letters}\"/ | /'{letters.replace('[^' + chr(92) + chr(34), '[^' + chr(39))}'/"

    def _any(self) -> str:
        name = f"{self._name}_any"
        if not self._lark.has(name):
            self._lark.rule(name, "")
            kinds = (self._of_type(kind, {}, 0) for kind in ("boolean", "null", "number", "string", "array", "object"))
            self._lark.rule(name, " | ".join(kinds))
        return name

    def _literal(self, value: Any) -> str:
        """A value as it stands in the grammar."""
        return self._lark.sequence(self._pieces(value))

    def _pieces(self, value: Any) -> Pieces:
        true, false, null = self._style.words
        if value is None or isinstance(value, bool):
            return (Text(null if value is None else true if value else false),)
        if isinstance(value, str):
            quote = self._style.quote
            if quote and _holds(value, quote):
                raise _refused(self._tool, "its enum has what this model's calls cannot hold")
            return (*quote, Text(value), *quote) if quote else (Text(json.dumps(value, ensure_ascii=False)),)
        if isinstance(value, int | float):
            return (Text(json.dumps(value)),)
        raise _refused(self._tool, "an enum of this model's calls can hold no lists and objects")

    def _spelled(self, key: str) -> str:
        return json.dumps(key, ensure_ascii=False)


def _check_keys(tool: Tool, schema: Any, known: frozenset[str]) -> None:
    if not tool.strict or not isinstance(schema, dict):
        return
    if unknown := sorted(schema.keys() - known):
        raise _refused(tool, f"{unknown[0][:60]!r} cannot be enforced in the way that this model writes calls")
    for option in schema.get("anyOf", ()):
        _check_keys(tool, option, known)


def _check_required(tool: Tool, properties: dict[str, Any], required: set[str]) -> None:
    if tool.strict and (unknown := sorted(required - properties.keys())):
        raise _refused(tool, f"{unknown[0][:60]!r} is required, but is not among the properties")


def _refused(tool: Tool, problem: str) -> InvalidParameter:
    mend = "leave it out, or strict" if tool.strict else "mend the schema"
    problem = problem.removesuffix("; leave it out")
    return InvalidParameter(f"the parameters of tool {tool.name!r} cannot be kept to: {problem}; {mend}", "tools")
