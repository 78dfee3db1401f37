"""The structure that a caller wants an output to have, as the field's parameter `structured_outputs` says it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from quire_engine.errors import InvalidParameter
from quire_engine.guidance import grammars
from quire_engine.guidance.schemas import check_depth, text_of, without_patterns
from quire_engine.guidance.spec import GuidanceSpec, Section

MAX_GRAMMAR = 1 << 18  # characters of any kind of grammar
MAX_CHOICES = 10_000
MAX_TAGS = 256
_MOST_SECTIONS = 1 << 30
_NAME = "structured_outputs"
_CONTENTS = {"json_schema": "json_schema", "regex": "pattern", "grammar": "grammar"}  # of a tag: its kind → its field


@dataclass(frozen=True, kw_only=True)
class StructuredOutputs:
    """One of these. Raises InvalidParameter for any other number, and for what is too large."""

    json: Any = None  # a JSON schema, or its text
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None  # Lark, or GBNF
    json_object: bool | None = None
    structural_tag: Any = None  # parts of an output that follow grammars of their own
    lenient: bool = False  # what of a schema no grammar can hold is not held, where it is refused otherwise

    def __post_init__(self) -> None:
        if not isinstance(self.json_object, bool | None):
            raise InvalidParameter(
                f"structured_outputs has json_object = {self.json_object!r:.80}; it must be true or false", _NAME
            )
        given = [name for name in _KINDS if getattr(self, name) is not None]
        if self.json_object is False:
            given.remove("json_object")
        if len(given) != 1:
            raise InvalidParameter(
                f"structured_outputs holds {' and '.join(given) or 'nothing'}; give one of {', '.join(_KINDS)}", _NAME
            )
        for name in ("regex", "grammar"):
            if name in given:
                _check_text(name, getattr(self, name))
        if self.choice is not None:
            _check_choices(self.choice)

    @staticmethod
    def of(value: Any) -> "StructuredOutputs":
        """From named fields. Raises InvalidParameter."""
        if isinstance(value, StructuredOutputs):
            return value
        if not isinstance(value, Mapping):
            raise InvalidParameter(
                f"structured_outputs is {value!r:.80}; give an object with {', '.join(_KINDS)}", _NAME
            )
        if unknown := [name for name in value if name not in _KINDS]:
            raise InvalidParameter(
                f"structured_outputs has no {str(unknown[0])[:60]}; it has {', '.join(_KINDS)}", _NAME
            )
        return StructuredOutputs(**value)

    def spec(self, delimiters: Mapping[str, int]) -> GuidanceSpec:
        """`delimiters`: the vocabulary's, by their spelling."""
        if self.structural_tag is not None:
            return _tags(_read("structural_tag", self.structural_tag), delimiters)
        return GuidanceSpec(content=grammars.composed(self.content()))

    def content(self) -> dict[str, Any]:
        """The grammar, but for structural tags."""
        if self.json is not None:
            schema = _read("json", self.json)
            found = grammars.json_schema(schema, lenient=self.lenient)
            if self.lenient and grammars.problem_of(grammars.composed(found)):
                found = grammars.json_schema(without_patterns(schema), lenient=True)
            return found
        if self.json_object:
            return grammars.json_schema({"type": "object"})
        if self.regex is not None:
            return grammars.regex(self.regex)
        if self.choice is not None:
            return grammars.one_of(self.choice)
        assert self.grammar is not None, "there is a structural tag"
        return grammars.from_ebnf(self.grammar)

    def check(self) -> None:
        """Compiles it once, without a vocabulary. Raises InvalidParameter."""
        if self.structural_tag is None:
            grammars.check(grammars.composed(self.content()))
            return
        for section in self.spec({}).sections:
            grammars.check(section.grammar)


_KINDS = tuple(field.name for field in fields(StructuredOutputs) if field.name != "lenient")


def _check_text(name: str, text: Any) -> None:
    if not isinstance(text, str) or not text:
        raise InvalidParameter(f"structured_outputs has {name} = {text!r:.80}; it must be a text", _NAME)
    if len(text) > MAX_GRAMMAR:
        raise InvalidParameter(
            f"the {name} of structured_outputs has {len(text)} characters; at most {MAX_GRAMMAR} are read", _NAME
        )
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise InvalidParameter(f"the {name} of structured_outputs holds half a surrogate pair, which is no text", _NAME)


def _check_choices(choices: Any) -> None:
    if not isinstance(choices, Sequence) or isinstance(choices, str) or not choices:
        raise InvalidParameter(f"structured_outputs has choice = {choices!r:.80}; it must be a list of texts", _NAME)
    if len(choices) > MAX_CHOICES:
        raise InvalidParameter(
            f"the choice of structured_outputs has {len(choices)} entries; at most {MAX_CHOICES} are taken", _NAME
        )
    for one in choices:
        _check_text("choice", one)
    if sum(map(len, choices)) > MAX_GRAMMAR:
        raise InvalidParameter(f"the choices of structured_outputs have more than {MAX_GRAMMAR} characters", _NAME)


def _read(name: str, value: Any) -> Any:
    """An object, or its text. Raises InvalidParameter."""
    if isinstance(value, str):
        _check_text(name, value)
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InvalidParameter(f"the {name} of structured_outputs is no JSON ({error})", _NAME) from error
    if not isinstance(value, Mapping | bool):
        raise InvalidParameter(f"structured_outputs has {name} = {value!r:.80}; it must be an object", _NAME)
    try:
        check_depth(value, _NAME)
        size = len(text_of(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidParameter(f"the {name} of structured_outputs is no JSON ({error})", _NAME) from error
    if size > MAX_GRAMMAR:
        raise InvalidParameter(
            f"the {name} of structured_outputs has {size} characters; at most {MAX_GRAMMAR} are read", _NAME
        )
    return value


def _tags(value: Any, delimiters: Mapping[str, int]) -> GuidanceSpec:
    """Text in which a trigger begins one of the tags that begin with it. Raises InvalidParameter."""
    given = _described(value)
    triggers: Any = given.get("triggers")
    tags: Any = given.get("tags")
    if not _texts(triggers) or not isinstance(tags, list) or not 1 <= len(tags) <= MAX_TAGS:
        raise InvalidParameter(
            f"a structural tag wants triggers (texts) and from 1 to {MAX_TAGS} tags (or structures)", _NAME
        )
    sections = []
    for trigger in dict.fromkeys(triggers):
        rules, named = [], {}
        for number, tag in enumerate(tags):
            begin, content, end = _tag(number, tag)
            if not begin.startswith(trigger):
                continue
            begins = grammars.literal(grammars.marker_of(begin.removeprefix(trigger), delimiters))
            ends = grammars.literal(grammars.marker_of(end, delimiters))
            rules.append(f"{begins} @tag_{number} {ends}".rstrip())
            named[f"tag_{number}"] = content
        if not rules:
            raise InvalidParameter(f"the trigger {trigger[:60]!r} begins no tag", _NAME)
        opener = grammars.marker_of(trigger, delimiters)
        body = "body: " + " | ".join(rules)
        sections.append(Section(signs=(opener,), grammar=grammars.composed(grammars.section((opener,), body), **named)))
    if idle := [tag for tag in tags if not any(_tag(0, tag)[0].startswith(trigger) for trigger in triggers)]:
        raise InvalidParameter(f"no trigger begins the tag {_tag(0, idle[0])[0][:60]!r}", _NAME)
    return GuidanceSpec(sections=tuple(sections), most=_MOST_SECTIONS, then_end=bool(given.get("stop_after_first")))


def _described(value: Any) -> Mapping[str, Any]:
    """Both ways of the field to write it, in one. Raises InvalidParameter."""
    if not isinstance(value, Mapping) or value.get("type") != "structural_tag":
        raise InvalidParameter('a structural tag is an object of type "structural_tag"', _NAME)
    _only(value, ("type", "format", "structures", "triggers"))
    if (form := value.get("format")) is None:
        return {"triggers": value.get("triggers"), "tags": value.get("structures")}
    if not isinstance(form, Mapping) or form.get("type") != "triggered_tags":
        kind = form.get("type") if isinstance(form, Mapping) else form
        raise InvalidParameter(f"the format {kind!r:.60} of structural tags is not served; triggered_tags is", _NAME)
    _only(form, ("type", "triggers", "tags", "stop_after_first"))
    return form


def _tag(number: int, tag: Any) -> tuple[str, dict[str, Any], str]:
    """How it begins, its content's grammar, how it ends. Raises InvalidParameter."""
    if not isinstance(tag, Mapping):
        raise InvalidParameter(f"tag {number} is {tag!r:.60}; it must be an object with begin, schema and end", _NAME)
    _only(tag, ("type", "begin", "end", "schema", "content"))
    begin, end = tag.get("begin"), tag.get("end", "")
    if not isinstance(begin, str) or not begin or not isinstance(end, str):
        raise InvalidParameter(f"tag {number} has no begin or no end; both are texts", _NAME)
    content = tag.get("content")
    if content is None:
        return begin, grammars.json_schema(_read("schema", tag.get("schema", {}))), end
    kind = content.get("type") if isinstance(content, Mapping) else None
    field = _CONTENTS.get(kind) if isinstance(kind, str) else None
    if field is None:
        raise InvalidParameter(
            f"tag {number} has content of type {kind!r:.60}; {', '.join(_CONTENTS)} are served", _NAME
        )
    _only(content, ("type", field))
    if kind == "json_schema":
        return begin, grammars.json_schema(_read("json_schema", content.get(field, {}))), end
    _check_text(field, text := content.get(field))
    return begin, grammars.regex(text) if kind == "regex" else grammars.from_ebnf(text), end


def _only(value: Mapping[str, Any], known: tuple[str, ...]) -> None:
    if unknown := [name for name in value if name not in known]:
        raise InvalidParameter(f"a structural tag has no {str(unknown[0])[:60]!r} there; leave it out", _NAME)


def _texts(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(one, str) and one for one in values)
