"""What is nearly a tool, a schema or a structure: each key and value has its place somewhere, but seldom here."""

from typing import Any

from hypothesis import strategies as st


def function(name: Any = "f", **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name} | fields}


def of(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


def schema_format(schema: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema} | fields}


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
_KEYWORDS = """
type properties required items enum const anyOf oneOf allOf $ref $defs not if then pattern format minimum maximum
minLength maxItems minProperties additionalProperties patternProperties prefixItems uniqueItems multipleOf nullable
name parameters function strict description json_schema schema regex choice
"""
KEYWORDS = st.sampled_from(_KEYWORDS.split())
TYPES = st.sampled_from(["object", "array", "string", "integer", "number", "null", "function", "json_schema", "#"])
JSON = st.recursive(
    LEAVES | TYPES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYWORDS | st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
PARAMETERS = st.builds(lambda more, a: of(a=a) | more, st.dictionaries(KEYWORDS, JSON, max_size=2), JSON)
TOOLS = st.lists(
    st.builds(lambda name, schema: function(name, parameters=schema), st.sampled_from(["f", "g", "h-1"]), PARAMETERS)
    | JSON,
    max_size=3,
)
CHOICES = st.sampled_from(["auto", "none", "required", function("f"), {"type": "function"}]) | JSON
FORMATS = st.builds(schema_format, JSON | PARAMETERS) | JSON
FIELDS = st.sampled_from(["regex", "grammar", "json_schema", "any_text"])
CONTENTS = st.builds(lambda kind, field, value: {"type": kind, field: value}, FIELDS, FIELDS, JSON) | JSON
TAG = st.builds(lambda content: {"begin": "<a>", "content": content, "end": "</a>"}, CONTENTS) | JSON
FORMAT_OF_TAGS = st.builds(
    lambda tags: {"type": "triggered_tags", "triggers": ["<a"], "tags": tags}, st.lists(TAG, max_size=2)
)
TAGS = st.builds(lambda given: {"type": "structural_tag", "format": given}, FORMAT_OF_TAGS | JSON)
KINDS = st.sampled_from(["json", "json_object", "regex", "choice", "grammar", "structural_tag"])
STRUCTURES = (
    st.dictionaries(KINDS, JSON, min_size=1, max_size=1)
    | st.builds(lambda schema: {"json": schema}, PARAMETERS)
    | st.builds(lambda tags: {"structural_tag": tags}, TAGS)
    | JSON
)
