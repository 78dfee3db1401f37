"""A short notation for JSON schemas, for tables of them.

    {id: int, name: str<1..20>, tags?: [str]<0..3>, kind: "a" | "b", at: date-time, zip: /^\\d{5}$/, next: @node | null}

An object is closed unless it ends in `*: type`; `?` marks what may be missing; `@name` is a definition, `@` the root.
"""

import json
import re
from typing import Any

_TOKEN = re.compile(
    r"""\s*(?: (?P<word>[A-Za-z_$][\w$.-]*) | (?P<text>"(?:[^"\\]|\\.)*") | (?P<number>-?\d+(?:\.\d+)?(?!\d*\.\.))
    | (?P<pattern>/(?:[^/\\]|\\.)*/) | (?P<range><[^>]*>) | (?P<mark>[{}\[\]|:,?*@]) )""",
    re.VERBOSE,
)
_WORDS: dict[str, dict[str, Any]] = {
    "str": {"type": "string"},
    "int": {"type": "integer"},
    "num": {"type": "number"},
    "bool": {"type": "boolean"},
    "null": {"type": "null"},
    "any": {},
} | {
    name: {"type": "string", "format": name}
    for name in ("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid")
}
_BOUNDS = {
    "string": ("minLength", "maxLength"),
    "array": ("minItems", "maxItems"),
    "integer": ("minimum", "maximum"),
    "number": ("minimum", "maximum"),
    "object": ("minProperties", "maxProperties"),
}


def schema_of(text: str) -> dict[str, Any]:
    """The schema that a line says: a type, and after each semicolon a definition, `name = type`."""
    root, *definitions = text.split(";")
    schema = _Reader(root).whole()
    for definition in definitions:
        name, body = definition.split("=", 1)
        schema.setdefault("$defs", {})[name.strip()] = _Reader(body).whole()
    return schema


class _Reader:
    """Reads one type, token by token."""

    def __init__(self, text: str) -> None:
        self._tokens: list[tuple[str, str]] = []
        place = 0
        while text[place:].strip():
            found = _TOKEN.match(text, place)
            assert found is not None and found.lastgroup is not None, f"cannot read {text[place:]!r}"
            self._tokens.append((found.lastgroup, found[found.lastgroup]))
            place = found.end()

    def whole(self) -> dict[str, Any]:
        schema = self._type()
        assert not self._tokens, f"left over: {self._tokens}"
        return schema

    def _takes(self, mark: str) -> bool:
        if self._tokens and self._tokens[0] == ("mark", mark):
            self._tokens.pop(0)
            return True
        return False

    def _type(self) -> dict[str, Any]:
        choices = [self._one()]
        while self._takes("|"):
            choices.append(self._one())
        if all("const" in choice for choice in choices):
            return choices[0] if len(choices) == 1 else {"enum": [choice["const"] for choice in choices]}
        return choices[0] if len(choices) == 1 else {"anyOf": choices}

    def _one(self) -> dict[str, Any]:
        kind, value = self._tokens.pop(0)
        if kind in ("text", "number"):
            return {"const": json.loads(value)}
        if kind == "pattern":
            schema = {"type": "string", "pattern": value[1:-1].replace("\\/", "/")}
        elif kind == "word":
            schema = dict(_WORDS[value])
        elif value == "@":
            return {"$ref": f"#/$defs/{self._tokens.pop(0)[1]}" if self._next_is("word") else "#"}
        elif value == "[":
            schema = {"type": "array", "items": self._type()}
            assert self._takes("]")
        else:
            assert value == "{", f"no type begins with {value!r}"
            schema = self._fields()
        if self._next_is("range"):
            schema |= _bounds(schema["type"], self._tokens.pop(0)[1])
        return schema

    def _next_is(self, kind: str) -> bool:
        return bool(self._tokens) and self._tokens[0][0] == kind

    def _fields(self) -> dict[str, Any]:
        properties: dict[str, Any] = {}
        required: list[str] = []
        rest: Any = False
        while not self._takes("}"):
            kind, name = self._tokens.pop(0)
            name = json.loads(name) if kind == "text" else name
            optional = self._takes("?")
            assert self._takes(":"), f"no type for {name!r}"
            schema = self._type()
            if (kind, name) == ("mark", "*"):
                rest = schema
            else:
                properties[name] = schema
                required += [] if optional else [name]
            self._takes(",")
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": rest}


def _bounds(kind: str, written: str) -> dict[str, Any]:
    """`<1..3>`, `<1..>`, `<..3>`."""
    ends = written[1:-1].split("..")
    return {name: json.loads(end) for name, end in zip(_BOUNDS[kind], ends, strict=True) if end}
