"""JSON schemas, looked at before llguidance sees them: what would take it for ever, and what it would let pass wrongly.

The bounds are measured: within them the worst schema takes half a second to compile.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any

from quire_engine.errors import InvalidParameter

MAX_DEPTH = 64
MAX_NAMES = 4000  # of properties, and of those required
MAX_PROPERTIES = 2400  # of one object: see `limits`
MAX_PATTERNS = 64  # of one patternProperties
MAX_ALL_PATTERNS = 256
MAX_FACTOR = 10_000  # of all multipleOf together, without their factors 2 and 5: what it takes grows with it
MAX_INTEGER = 2**53  # llguidance reads larger ones as floats
MAX_BOUND = 10**18  # it knows no larger ones
MAX_LENGTH = 2**31  # of strings: nobody writes longer ones, and it reads no number beyond 2^32 there
_DRAFTS = ("draft-04/", "draft-06/", "draft-07/", "draft/2019-09/", "draft/2020-12/")
_EXPONENT = 22  # the largest power of ten that is a float
_FOREIGN = {"extends": "draft 3", "disallow": "draft 3", "divisibleBy": "draft 3"}  # read by nobody
_APPLICATORS = ("allOf", "anyOf", "oneOf", "$ref", "enum", "const")
_COMBINING = {"allOf", "anyOf", "oneOf", "$ref", "if", "not"}
_OPEN = _COMBINING | {"additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames"}
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_NUMBERS = ("multipleOf", *_BOUNDS)
_NEGATED = re.compile(r"\\.|\[\^(\]?)", re.DOTALL)  # what is escaped, or where a negated class begins
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTED = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_NESTED = ("additionalProperties", "items", "additionalItems", "contains", "not", "if", "then", "else", "propertyNames")


def checked(schema: Any, parameter: str, *, lenient: bool = False) -> Any:
    """The schema as llguidance should get it. `lenient`: what no grammar can hold is left to be ignored.

    Raises InvalidParameter, naming `parameter`.
    """

    def refuse(problem: str) -> InvalidParameter:
        return InvalidParameter(f"the JSON schema {problem}", parameter)

    if schema is False:
        raise refuse("is false: no value would be right")
    if schema is True:
        return {}
    if not isinstance(schema, Mapping):
        raise refuse(f"is {schema!r:.60}; it must be an object")
    check_depth(schema, parameter)
    names = patterns = 0
    factor = 1
    for one in _objects(schema):
        here = one.get("patternProperties")
        count = len(here) if isinstance(here, Mapping) else 0
        patterns += count
        names += sum(
            len(found) for key in ("properties", "required") if isinstance(found := one.get(key), Mapping | list)
        )
        factor = math.lcm(factor, _factor(one.get("multipleOf")))
        if count > MAX_PATTERNS or patterns > MAX_ALL_PATTERNS:
            raise refuse(
                f"has too many patternProperties: at most {MAX_PATTERNS} in one place and {MAX_ALL_PATTERNS} in all"
            )
        if isinstance(found := one.get("properties"), Mapping) and len(found) > MAX_PROPERTIES:
            raise refuse(f"has an object of more than {MAX_PROPERTIES} properties; make it smaller")
        if names > MAX_NAMES:
            raise refuse(f"names more than {MAX_NAMES} properties; make it smaller")
        if factor > MAX_FACTOR:
            raise refuse("has multipleOf whose least common multiple is too large; make it smaller, or leave it out")
    if lenient:
        schema = rewritten(schema, _within_reach)
    else:
        for one in _schemas(schema):
            _check_keywords(one, refuse)
    return _without_noise(schema)


def closed(schema: Any, parameter: str) -> Any:
    """The same, but that objects which name their properties have no others, unless they say so: a model that may add
    some goes on adding. Where schemas are put together of several (allOf, or beside properties) it stays as it is.

    Raises InvalidParameter for what is nested too deeply.
    """
    check_depth(schema, parameter)
    for one in _schemas(schema):
        if one.keys() & _COMBINING and ("properties" in one or len(_listed(one.get("allOf"))) > 1):
            return schema
    return rewritten(schema, _closed_here)


def without_patterns(schema: Any) -> Any:
    """The same without its regular expressions, of which llguidance does not know all."""
    named = ("pattern", "patternProperties")
    return rewritten(schema, lambda one: {name: value for name, value in one.items() if name not in named})


def _closed_here(schema: dict[str, Any]) -> dict[str, Any]:
    properties = schema.get("properties")
    if not isinstance(properties, Mapping) or schema.keys() & _OPEN:
        return schema
    named = all(isinstance(name, str) and name in properties for name in _listed(schema.get("required")))
    return schema | {"additionalProperties": False} if named else schema


def check_depth(value: Any, parameter: str) -> None:
    """Raises InvalidParameter for what is nested too deeply."""
    depth, inner = 0, [value]
    while inner:
        depth += 1
        if depth > MAX_DEPTH:
            raise InvalidParameter(
                f"the JSON schema is nested more than {MAX_DEPTH} deep; make it flatter, by $ref say", parameter
            )
        inner = [
            item
            for one in inner
            if isinstance(one, Mapping | list)
            for item in (one.values() if isinstance(one, Mapping) else one)
        ]


def text_of(schema: Any) -> str:
    """As JSON. Raises ValueError or TypeError for what is none, and for half a surrogate pair, which is no text."""
    text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text.encode()
    return text


def _check_keywords(schema: Mapping[str, Any], refuse: Any) -> None:
    """What llguidance passes over, though it would make a difference."""
    for name, where in _FOREIGN.items():
        if name in schema:
            raise refuse(f"has {name}, a keyword of {where}; write it in draft 2020-12")
    if schema.get("nullable"):
        raise refuse('has nullable, which is OpenAPI\'s; write "type": [..., "null"]')
    if isinstance(schema.get("required"), bool):
        raise refuse("has required within a property, as draft 3 has it; list the names in the object's required")
    draft = schema.get("$schema")
    if isinstance(draft, str) and not any(known in draft for known in _DRAFTS):
        raise refuse(f"is of {draft[:60]!r}; drafts 4 to 2020-12 are known")
    if "additionalItems" in schema and ("prefixItems" in schema or any(name in schema for name in _APPLICATORS)):
        raise refuse("has additionalItems where it cannot be kept to; write prefixItems and items")
    least = schema.get("minProperties")
    if isinstance(least, int) and least > max(1, len(_listed(schema.get("required")))):
        raise refuse("has a minProperties that cannot be kept to; name the properties in required")
    for value in [schema.get(name) for name in _NUMBERS]:
        if type(value) is int and abs(value) > MAX_INTEGER:
            raise refuse(f"has the integer {str(value)[:24]}, which is beyond 2^53; use another bound, or none")
    for value in _values(schema):
        if not _is_exact(value):
            raise refuse(f"has {str(value)[:40]} in an enum or const, a number of too many digits; use a string")


def _within_reach(schema: dict[str, Any]) -> dict[str, Any]:
    """Without bounds that llguidance does not know, and without values of which it would write others."""
    found = {name: value for name, value in schema.items() if not (name in _BOUNDS and _is_beyond(value, MAX_BOUND))}
    values = _values(schema)
    if not all(_is_exact(value) for value in values):
        found = {name: value for name, value in found.items() if name not in ("enum", "const")}
        if all(type(value) is int for value in values):
            found = {"type": "integer"} | found
    return found


def _values(schema: Mapping[str, Any]) -> list[Any]:
    """Of its enum and its const."""
    return [*_listed(schema.get("enum")), *([schema["const"]] if "const" in schema else [])]


def _is_exact(value: Any) -> bool:
    """Whether llguidance writes all the numbers of a value as they are: those of many digits it rounds."""
    if isinstance(value, Mapping | list):
        return all(_is_exact(inner) for inner in (value.values() if isinstance(value, Mapping) else value))
    if isinstance(value, float) and math.isfinite(value):
        _, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
        return int("".join(map(str, digits))) <= MAX_INTEGER and abs(int(exponent)) <= _EXPONENT
    return type(value) is not int or abs(value) <= MAX_INTEGER


def _is_beyond(value: Any, limit: int) -> bool:
    return isinstance(value, int | float) and abs(value) >= limit


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _objects(value: Any) -> Iterator[Mapping[str, Any]]:
    """Every object, be it a schema or not."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, Mapping):
            yield one
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one


def _schemas(schema: Any) -> Iterator[Mapping[str, Any]]:
    """Every schema in a schema; values (of enum, const, default, examples) are none."""
    waiting = [schema]
    while waiting:
        one = waiting.pop()
        if not isinstance(one, Mapping):
            continue
        yield one
        for name in _NAMED:
            if isinstance(one.get(name), Mapping):
                waiting += one[name].values()
        for name in _LISTED:
            if isinstance(one.get(name), list):
                waiting += one[name]
        waiting += [one[name] for name in _NESTED if name in one]


def _factor(value: Any) -> int:
    """Of a multipleOf: its digits as an integer, without the factors 2 and 5, which cost nothing."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value:
        return 1
    if isinstance(value, float) and not math.isfinite(value):
        return 1
    number = Fraction(str(value))
    found = abs(number.numerator)
    for prime in (2, 5):
        while found % prime == 0:
            found //= prime
    return found


def _without_noise(schema: Any) -> Any:
    """Without what says nothing and is refused all the same, without llguidance's own options, and with patterns as it
    reads them rightly."""

    def quiet(one: dict[str, Any]) -> dict[str, Any]:
        found = {
            name: value
            for name, value in one.items()
            if name != "x-guidance"
            and not (name == "uniqueItems" and value is False)
            and not (name == "maxLength" and _is_beyond(value, MAX_LENGTH))
        }
        if isinstance(pattern := found.get("pattern"), str):
            found["pattern"] = _without_nul(pattern)
        if isinstance(patterns := found.get("patternProperties"), Mapping):
            found["patternProperties"] = {_without_nul(key): value for key, value in patterns.items()}
        return found

    return rewritten(schema, quiet)


def rewritten(schema: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """Every schema in a schema, changed; values (of enum, const, ...) are none."""
    if not isinstance(schema, Mapping):
        return schema
    found = {}
    for name, value in schema.items():
        if name in _NAMED and isinstance(value, Mapping):
            value = {key: rewritten(one, change) for key, one in value.items()}
        elif name in _LISTED and isinstance(value, list):
            value = [rewritten(one, change) for one in value]
        elif name in _NESTED:
            value = rewritten(value, change)
        found[name] = value
    return change(found)


def _without_nul(pattern: str) -> str:
    """With U+0000 left out of each negated class: of one that has all control characters llguidance would take a quote
    and a backslash too, escaped as JSON has them, be they in it or not."""
    return _NEGATED.sub(
        lambda found: found[0] if found[0][0] == "\\" else "[^\\x00-\\x00" + re.escape(found[1]), pattern
    )
