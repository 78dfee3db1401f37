"""JSON schemas for each keyword: those that can be guided by, and those that must be refused."""

from typing import Any

STR = {"type": "string"}
INT = {"type": "integer"}
NUM = {"type": "number"}
NULL = {"type": "null"}


def _object(*required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required)}


def _kind(name: str, **properties: Any) -> dict[str, Any]:
    """One variant of a tagged union."""
    return _object("kind", *properties, kind={"const": name}, **properties)


def _root(ref: str, **definitions: Any) -> dict[str, Any]:
    return {"$ref": f"#/$defs/{ref}", "$defs": definitions}


KEYWORDS: dict[str, Any] = {
    # any value
    "empty": {},
    "annotations alone": {"title": "t", "description": "d", "default": 1, "examples": [1], "$comment": "c"},
    "annotations beside a type": INT | {"title": "t", "default": "x", "deprecated": True, "readOnly": True},
    "unknown words": INT | {"x-order": 1, "example": 3, "foo": {"type": "string"}},
    "content of a string": STR | {"contentEncoding": "base64", "contentMediaType": "image/png"},
    "the draft is named": {"$schema": "https://json-schema.org/draft/2020-12/schema", "type": "boolean"},
    # type
    **{
        f"type {name}": {"type": name} for name in ("null", "boolean", "integer", "number", "string", "array", "object")
    },
    "types, two": {"type": ["integer", "null"]},
    "types, one": {"type": ["string"]},
    "types, all": {"type": ["null", "boolean", "integer", "number", "string", "array", "object"]},
    "types with bounds of each": {"type": ["string", "integer"], "maxLength": 3, "minimum": 5},
    # enum and const
    "enum strings": {"enum": ["red", "green", "blue"]},
    "enum one": {"enum": ["only"]},
    "enum mixed": {"enum": [None, True, 1, 2.5, "x", [1, 2], {"a": None}]},
    "enum of prefixes": {"enum": ["a", "ab", "abc", "abcd", ""]},
    "enum odd characters": {
        "enum": ['"', "\\", "/", "\n\r\t\b\f", "\x00", "\x1f", "\x7f", " ", "'", "`", "{}", "[],:"]
    },
    "enum of other scripts": {
        "enum": ["é", "e\u0301", "ß", "日本語", "العربية", "😀", "👩‍👩‍👧", "\u2028", "\ufeff", "\uffff"]
    },
    "enum of spellings": {"enum": ["null", "true", "1", "1.0", "[]", "{}"]},
    "enum of numbers": {"enum": [0, -1, 1.5, 1000000, 1e-3, -0.25]},
    "enum narrowed by type": STR | {"enum": ["a", 1, None]},
    "enum narrowed by length": {"enum": ["a", "bb", "ccc"], "maxLength": 2, "type": "string"},
    "enum of objects": {"enum": [{"a": 1}, {"a": 2, "b": []}, {}]},
    "enum of 300": {"enum": [f"choice {index * 7919 % 1000}" for index in range(300)]},
    "const string": {"const": "fixed"},
    "const empty string": {"const": ""},
    "const null": {"const": None},
    "const false": {"const": False},
    "const zero": {"const": 0},
    "const negative": {"const": -17},
    "const fraction": {"const": 3.14159},
    "const array": {"const": [1, "a", [None]]},
    "const object": {"const": {"a": {"b": [1]}, "c": "d"}},
    "const 2^53": {"const": 2**53},
    # numbers
    "minimum": INT | {"minimum": 7},
    "maximum": INT | {"maximum": -3},
    "integer range": INT | {"minimum": 98, "maximum": 103},
    "integer range over zero": INT | {"minimum": -12, "maximum": 105},
    "integer range of one": INT | {"minimum": 5, "maximum": 5},
    "integer with fractional bounds": INT | {"minimum": 1.5, "maximum": 4.5},
    "integer between exclusive bounds": INT | {"exclusiveMinimum": 0, "exclusiveMaximum": 3},
    "number range": NUM | {"minimum": 0, "maximum": 1},
    "number range, narrow": NUM | {"minimum": 0.125, "maximum": 0.126},
    "number range, negative": NUM | {"minimum": -2.5, "maximum": -1.5},
    "number between exclusive bounds": NUM | {"exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "number above": NUM | {"exclusiveMinimum": 99.5},
    "exclusive and inclusive": NUM | {"minimum": 1, "exclusiveMinimum": 1, "maximum": 3},
    "bounds without a type": {"minimum": 10},
    "exclusive as draft 4 has it": INT
    | {"minimum": 1, "exclusiveMinimum": True, "maximum": 3}
    | {"$schema": "http://json-schema.org/draft-04/schema#"},
    "multiple of 3": INT | {"multipleOf": 3},
    "multiple of 7 in a range": INT | {"multipleOf": 7, "minimum": 50, "maximum": 100},
    "multiple of 0.01": NUM | {"multipleOf": 0.01},
    "multiple of 0.25": NUM | {"multipleOf": 0.25, "minimum": 0, "maximum": 2},
    "multiples of 4 and 6": {"allOf": [INT | {"multipleOf": 4}, {"multipleOf": 6}]},
    "large bounds": INT | {"minimum": -(2**53), "maximum": 2**53},
    # strings
    "minLength": STR | {"minLength": 3},
    "maxLength": STR | {"maxLength": 2},
    "length of two": STR | {"minLength": 2, "maxLength": 2},
    "length of none": STR | {"maxLength": 0},
    "length of 300": STR | {"minLength": 30, "maxLength": 300},
    "pattern": STR | {"pattern": "^[a-z]{2,5}$"},
    "pattern without anchors": STR | {"pattern": "[0-9]"},
    "pattern with one anchor": STR | {"pattern": "^ab"},
    "pattern of alternatives with anchors": STR | {"pattern": "^a|b$"},
    "pattern of nothing": STR | {"pattern": "^$"},
    "pattern with quotes": STR | {"pattern": '^"[^"\\\\]*"$', "maxLength": 12},
    "pattern with slashes": STR | {"pattern": "^/[a-z]*(/[a-z]*)*$"},
    "pattern of classes": STR | {"pattern": "^\\w+ \\d+\\s[^0-9]$"},
    "pattern of negated classes": STR | {"pattern": "^[^a-z\\s]{1,4}$"},
    "pattern with escapes": STR | {"pattern": "^\\u0041\\x42\\.\\*\\t$"},
    "pattern of other scripts": STR | {"pattern": "^[à-ÿ日本]+$"},
    "pattern with counted repetition": STR | {"pattern": "^(\\d{3}-){2}\\d{4}$"},
    "pattern lazy": STR | {"pattern": "^a+?b*?c??$"},
    "pattern with groups": STR | {"pattern": "^(?:(a|b)(c|d)){1,3}$"},
    "pattern and lengths": STR | {"pattern": "^[a-z-]+$", "minLength": 4, "maxLength": 9},
    "pattern without a type": {"pattern": "^x"},
    "lengths without a type": {"minLength": 2, "maxLength": 4},
    **{
        f"format {name}": STR | {"format": name}
        for name in ("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid")
    },
    "format and length": STR | {"format": "email", "maxLength": 12},
    "format and pattern": STR | {"format": "date", "pattern": "^2024-"},
    # arrays
    "items": {"type": "array", "items": INT},
    "items false": {"type": "array", "items": False},
    "items of items": {"type": "array", "items": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}},
    "minItems": {"type": "array", "items": NULL, "minItems": 3},
    "maxItems": {"type": "array", "items": INT, "maxItems": 2},
    "items, exactly two": {"type": "array", "items": STR, "minItems": 2, "maxItems": 2},
    "items, none": {"type": "array", "maxItems": 0},
    "items of anything": {"type": "array", "minItems": 1, "maxItems": 3},
    "tuple": {"type": "array", "prefixItems": [INT, STR, {"type": "boolean"}], "items": False, "minItems": 3},
    "tuple that may end early": {"type": "array", "prefixItems": [INT, STR], "items": False},
    "tuple with more": {"type": "array", "prefixItems": [STR, INT], "items": {"const": "more"}, "minItems": 1},
    "tuple left open": {"type": "array", "prefixItems": [INT]},
    "tuple with bounds": {"type": "array", "prefixItems": [INT, INT], "minItems": 1, "maxItems": 3},
    "tuple of tuples": {
        "type": "array",
        "prefixItems": [{"type": "array", "prefixItems": [NULL], "items": False, "minItems": 1}, INT],
        "items": False,
        "minItems": 2,
    },
    "items without a type": {"items": INT, "maxItems": 2},
    # objects
    "properties optional": {"type": "object", "properties": {"a": INT, "b": STR, "c": NULL}},
    "properties required": _object("a", "b", a=INT, b=STR),
    "properties, some required": _object("b", a=INT, b=STR, c=NULL),
    "properties closed": _object("a", a=INT, b=STR) | {"additionalProperties": False},
    "properties closed before they are named": {"additionalProperties": False} | _object("a", a=INT),
    "additional properties of a type": _object("a", a=INT) | {"additionalProperties": {"type": "boolean"}},
    "map": {"type": "object", "additionalProperties": INT},
    "object empty": {"type": "object", "additionalProperties": False},
    "object of no properties": {"type": "object", "properties": {}, "additionalProperties": False},
    "required but not described": {"type": "object", "required": ["x", "y"]},
    "required of additional": {"type": "object", "required": ["x"], "additionalProperties": INT},
    "property never": {"type": "object", "properties": {"a": False, "b": INT}, "required": ["b"]},
    "property of anything": _object("a", a=True) | {"additionalProperties": False},
    "property names odd": _object('"', "", "a b", **{'"': INT, "": INT, "a b": INT, "é\n😀": INT, "$ref": STR}),
    "property names of keywords": _object("type", "properties", type=STR, properties=INT, required=NULL, enum=INT),
    "property names that begin alike": _object("a", "ab", a=INT, ab=INT, abc=INT) | {"additionalProperties": False},
    "patternProperties": {"type": "object", "patternProperties": {"^n_": INT}, "additionalProperties": False},
    "patternProperties, two": {"type": "object", "patternProperties": {"^a": INT, "^b": STR}},
    "patternProperties and properties": _object("n_x", n_x={"minimum": 3})
    | {"patternProperties": {"^n_": INT}, "additionalProperties": False},
    "minProperties of a map": {"type": "object", "additionalProperties": INT, "minProperties": 1},
    "maxProperties of a map": {"type": "object", "additionalProperties": INT, "maxProperties": 2},
    "no properties at all": {"type": "object", "maxProperties": 0},
    "at least one of two": {"type": "object", "properties": {"a": INT, "b": INT}, "minProperties": 1}
    | {"additionalProperties": False},
    "nested five deep": _object("a", a=_object("b", b=_object("c", c=_object("d", d=_object("e", e=INT))))),
    "properties without a type": {"properties": {"a": INT}, "required": ["a"]},
    "forty optional properties": {"type": "object", "properties": {f"p{index}": INT for index in range(40)}}
    | {"additionalProperties": False},
    # in-place applicators
    "anyOf types": {"anyOf": [INT, STR, NULL]},
    "anyOf one": {"anyOf": [INT]},
    "anyOf objects": {"anyOf": [_object("a", a=INT), _object("b", b=STR)]},
    "anyOf overlapping": {"anyOf": [INT | {"minimum": 5}, INT | {"maximum": 8}]},
    "anyOf with an impossible one": {"anyOf": [False, INT]},
    "anyOf beside properties": _object(a=INT, b=STR) | {"anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
    "anyOf nullable": {"anyOf": [_object("a", a=INT) | {"additionalProperties": False}, NULL]},
    "anyOf of enums": {"anyOf": [{"enum": [1, 2]}, {"enum": ["a", "b"]}]},
    "anyOf in anyOf": {"anyOf": [{"anyOf": [INT, NULL]}, {"anyOf": [STR, {"type": "boolean"}]}]},
    "oneOf types": {"oneOf": [INT, STR]},
    "oneOf of constants": {"oneOf": [{"const": "a"}, {"const": "b", "title": "B"}]},
    "oneOf tagged": {"oneOf": [_kind("circle", r=NUM), _kind("square", side=NUM)]},
    "oneOf tagged by enums": {"oneOf": [_kind("x"), _object("kind", kind={"enum": ["y", "z"]}, n=INT)]},
    "oneOf with null": {"oneOf": [NULL, {"type": "array", "items": INT, "maxItems": 2}]},
    "allOf bounds": {"allOf": [INT, {"minimum": 3}, {"maximum": 9}]},
    "allOf objects": {"allOf": [_object("a", a=INT), _object("b", b=STR)]},
    "allOf beside properties": _object("a", a=INT) | {"allOf": [_object("b", b=STR)]},
    "allOf same property": {"allOf": [_object("a", a={"minimum": 2}), _object(a=INT | {"maximum": 4})]},
    "allOf patterns": {"allOf": [STR | {"pattern": "^a"}, {"pattern": "z$"}, {"maxLength": 6}]},
    "allOf of anyOf": {"allOf": [{"anyOf": [INT, STR]}, {"anyOf": [STR, NULL]}]},
    "allOf arrays": {
        "allOf": [{"type": "array", "items": INT}, {"type": "array", "items": {"minimum": 1}, "maxItems": 2}]
    },
    "allOf tuples": {
        "allOf": [{"type": "array", "prefixItems": [INT], "minItems": 1}, {"type": "array", "items": {"minimum": 4}}],
    },
    "allOf empty": {"allOf": [{}, True]},
    "const beside a type": STR | {"const": "c"},
    # references
    "ref": _root("a", a=INT),
    "ref to a ref": _root("a", a={"$ref": "#/$defs/b"}, b={"$ref": "#/$defs/c"}, c={"enum": ["end"]}),
    "ref by the older name": {"$ref": "#/definitions/a", "definitions": {"a": STR | {"maxLength": 3}}},
    "ref beside other keywords": _root("a", a=INT) | {"minimum": 3, "maximum": 4},
    "ref from properties": _object("x", "y", x={"$ref": "#/$defs/p"}, y={"$ref": "#/$defs/p"}) | {"$defs": {"p": NUM}},
    "ref to a property": _object("a", "b", a={"enum": [1, 2]}, b={"$ref": "#/properties/a"}),
    "ref with escapes": {"$ref": "#/$defs/a~1b~0c%25", "$defs": {"a/b~c%": INT}},
    "ref to an anchor": {"$ref": "#here", "$defs": {"a": {"$anchor": "here", "type": "boolean"}}},
    "ref to an id": {"$id": "https://example.com/s", "$ref": "t", "$defs": {"t": {"$id": "t", "type": "null"}}},
    "ref to the root": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2},
    "recursion by a property": _object("v", v=INT, next={"$ref": "#"}) | {"additionalProperties": False},
    "recursion by two": _root(
        "a",
        a={"anyOf": [INT, {"$ref": "#/$defs/b"}]},
        b={"type": "array", "items": {"$ref": "#/$defs/a"}, "maxItems": 2},
    ),
    "recursion of a map": {"type": "object", "additionalProperties": {"$ref": "#"}},
    "recursion of a tuple": _root(
        "cons",
        cons={
            "anyOf": [
                NULL,
                {"type": "array", "prefixItems": [INT, {"$ref": "#/$defs/cons"}]} | {"minItems": 2} | {"items": False},
            ]
        },
    ),
    "definitions unused": INT | {"$defs": {"a": STR, "b": {"$ref": "#/$defs/a"}}},
}

# name → a schema that no grammar holds, and a word of what it is told
REFUSED: dict[str, tuple[Any, str]] = {
    "contains": ({"type": "array", "contains": INT}, "contains"),
    "minContains": ({"type": "array", "contains": INT, "minContains": 2}, "minContains"),
    "maxContains": ({"type": "array", "contains": INT, "maxContains": 2}, "maxContains"),
    "uniqueItems": ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    "not": ({"not": {"const": 1}}, "not"),
    "not beside a type": (INT | {"not": {"const": 1}}, "not"),
    "if": ({"if": INT, "then": {"minimum": 3}}, "if"),
    "then": (INT | {"then": {"minimum": 3}}, "then"),
    "else": (INT | {"if": {"minimum": 3}, "else": {"maximum": 0}}, "else"),
    "propertyNames": ({"type": "object", "propertyNames": {"pattern": "^a"}}, "propertyNames"),
    "dependentRequired": ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    "dependentSchemas": ({"type": "object", "dependentSchemas": {"a": {"required": ["b"]}}}, "dependentSchemas"),
    "dependencies": ({"type": "object", "dependencies": {"a": ["b"]}}, "dependencies"),
    "unevaluatedProperties": ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties"),
    "unevaluatedItems": ({"type": "array", "unevaluatedItems": False}, "unevaluatedItems"),
    "$dynamicRef": ({"$dynamicRef": "#a", "$defs": {"x": {"$dynamicAnchor": "a"}}}, "$dynamicRef"),
    "$recursiveRef": ({"type": "array", "items": {"$recursiveRef": "#"}}, "$recursiveRef"),
    "oneOf that overlaps": ({"oneOf": [INT, NUM]}, "oneOf"),
    "oneOf of arrays": ({"oneOf": [{"type": "array", "items": INT}, {"type": "array", "items": STR}]}, "oneOf"),
    "oneOf of refs": ({"oneOf": [{"$ref": "#/$defs/a"}, NULL], "$defs": {"a": INT}}, "oneOf"),
    "patternProperties that overlap": (
        {"type": "object", "patternProperties": {"^a": INT, "z$": STR}},
        "patternProperty",
    ),
    "minProperties of optional ones": (_object(a=INT, b=INT) | {"minProperties": 2}, "minProperties"),
    "maxProperties of optional ones": (_object(a=INT, b=INT, c=INT) | {"maxProperties": 2}, "maxProperties"),
    "lookahead": (STR | {"pattern": "^(?=a)"}, "look-ahead"),
    "lookbehind": (STR | {"pattern": "(?<!a)b"}, "look-behind"),
    "backreference": (STR | {"pattern": "(a)\\1"}, "backreferences"),
    "word boundary": (STR | {"pattern": "\\ba"}, "lookarounds"),
    "pattern broken": (STR | {"pattern": "("}, "unclosed group"),
    "format idn-email": (STR | {"format": "idn-email"}, "idn-email"),
    "format uri-reference": (STR | {"format": "uri-reference"}, "uri-reference"),
    "format regex": (STR | {"format": "regex"}, "regex"),
    "format unknown": (STR | {"format": "colour"}, "colour"),
    "type unknown": ({"type": "text"}, "text"),
    "ref to nowhere": ({"$ref": "#/$defs/a"}, "/$defs/a"),
    "ref to another document": ({"$ref": "https://example.com/a.json"}, "https://example.com/a.json"),
    "ref to a file": ({"$ref": "file:///a.json"}, "file:///a.json"),
    "circular with siblings": (_root("a", a={"allOf": [{"$ref": "#/$defs/a"}, INT]}), "circular"),
    "false": ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "unsatisfiable"),
    "minimum above maximum": (INT | {"minimum": 5, "maximum": 1}, "greater than maximum"),
    "required but closed": (_object("z", a=INT) | {"additionalProperties": False}, "'z'"),
    "types that exclude each other": ({"allOf": [INT, STR]}, "incompatible types"),
    "enum of nothing": ({"enum": []}, "empty"),
}

# name → a schema, an output that it holds of, one that it does not
OUTPUTS: dict[str, tuple[Any, str, str]] = {
    "type": (INT, "-3", '"x"'),
    "integer": (INT, "0", "1.5"),
    "integer without a leading zero": (INT, "10", "01"),
    "number with an exponent": (NUM, "-1.5e-3", "1."),
    "string with an escape": (STR, '"a\\n\\"\\\\b"', '"\\x"'),
    "enum": ({"enum": ["a", "ab"]}, '"ab"', '"abc"'),
    "enum of spellings": ({"enum": ["1"]}, '"1"', "1"),
    "const": ({"const": {"a": [1]}}, '{"a": [1]}', '{"a": []}'),
    "minimum": (INT | {"minimum": 7}, "7", "6"),
    "exclusiveMinimum": (NUM | {"exclusiveMinimum": 7}, "7.01", "7.0"),
    "maximum": (NUM | {"maximum": -0.5}, "-0.5", "-0.49"),
    "multipleOf": (NUM | {"multipleOf": 0.1}, "0.3", "0.35"),
    "minLength in characters": (STR | {"minLength": 2}, '"日本"', '"é"'),
    "maxLength in characters": (STR | {"maxLength": 1}, '"😀"', '"ab"'),
    "maxLength of escapes": (STR | {"maxLength": 1}, '"\\n"', '"\\n\\n"'),
    "pattern": (STR | {"pattern": "^a+$"}, '"aa"', '"ab"'),
    "pattern within": (STR | {"pattern": "b"}, '"abc"', '"ac"'),
    "pattern of digits": (STR | {"pattern": "^\\d$"}, '"1"', '"x"'),
    "pattern without quotes": (STR | {"pattern": '^[^"]*$'}, '"a\\n"', '"a\\"b"'),
    "pattern without backslashes": (STR | {"pattern": "^[^\\\\]+$"}, '"\\""', '"\\\\"'),
    "pattern without brackets": (STR | {"pattern": "^[^]-]+\\[\\^]$"}, '"a[^]"', '"-[^]"'),
    "pattern without a dash": (STR | {"pattern": "^[^-a]$"}, '"b"', '"-"'),
    "pattern of names": (
        {"type": "object", "patternProperties": {'^[^"]*$': INT}, "additionalProperties": False},
        '{"a":1}',
        '{"\\"":1}',
    ),
    "format date": (STR | {"format": "date"}, '"2024-02-29"', '"2024-02-30"'),
    "format uuid": (STR | {"format": "uuid"}, '"123e4567-e89b-12d3-a456-426614174000"', '"123e4567"'),
    "format ipv4": (STR | {"format": "ipv4"}, '"127.0.0.1"', '"127.0.0.256"'),
    "format email": (STR | {"format": "email"}, '"a@b.c"', '"a.b.c"'),
    "items": ({"type": "array", "items": INT}, "[1, 2]", '[1, "2"]'),
    "minItems": ({"type": "array", "minItems": 2}, "[1,[]]", "[1]"),
    "maxItems": ({"type": "array", "maxItems": 1}, "[]", "[1,2]"),
    "prefixItems": ({"type": "array", "prefixItems": [INT], "items": STR}, '[1,"a"]', '["a"]'),
    "required": (_object("a", a=INT), '{"a": 1}', "{}"),
    "required of any": ({"type": "object", "required": ["x"]}, '{"x":null}', '{"y":1}'),
    "properties": (_object(a=INT), '{"b":1}', '{"a":null}'),
    "additionalProperties": (_object(a=INT) | {"additionalProperties": False}, "{}", '{"b":1}'),
    "additionalProperties of a type": ({"type": "object", "additionalProperties": INT}, '{"q":1}', '{"q":"1"}'),
    "a name spelled with an escape": (_object(a=INT), '{"a":1}', '{"\\u0061":"x"}'),
    "a name given twice, once with an escape": (_object(a=INT), '{"a":1,"b":"x"}', '{"a":1,"\\u0061":"x"}'),
    "patternProperties": ({"type": "object", "patternProperties": {"^n": INT}}, '{"n":1,"s":"x"}', '{"n":"x"}'),
    "minProperties": ({"type": "object", "minProperties": 1}, '{"a":1}', "{}"),
    "maxProperties": ({"type": "object", "maxProperties": 1}, '{"a":1}', '{"a":1,"b":2}'),
    "anyOf": ({"anyOf": [INT, NULL]}, "null", "true"),
    "anyOf beside properties": (_object(a=INT, b=INT) | {"anyOf": [{"required": ["b"]}]}, '{"b":1}', '{"a":1}'),
    "oneOf": ({"oneOf": [_kind("x", n=INT), _kind("y", s=STR)]}, '{"kind":"y","s":""}', '{"kind":"y","s":1}'),
    "allOf": ({"allOf": [INT, {"minimum": 3}]}, "3", "2"),
    "ref": (_root("a", a=INT), "1", "null"),
    "ref beside others": (_root("a", a=INT) | {"maximum": 3}, "3", "4"),
    "recursion": ({"type": "array", "items": {"$ref": "#"}}, "[[],[[]]]", "[[],[1]]"),
    "white space": (_object("a", a={"type": "array"}), '{ "a" :\n\t[ 1 , 2 ] }', '{"a":[1 2]}'),
    "nothing after it": (_object("a", a=INT), '{"a":1}', '{"a":1}}'),
}
