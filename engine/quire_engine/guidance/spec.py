"""What an output has to look like: plain data, made by whoever speaks text, and sent with a request as JSON."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from quire_engine.errors import InvalidParameter

Marker = tuple[str | int, ...]  # a delimiter: text, and tokens by their ids
_KEPT = 200  # characters of an error


@dataclass(frozen=True, kw_only=True, slots=True)
class Thinking:
    """Free text ahead of the content, between delimiters."""

    inside: bool  # the prompt has begun it
    begin: Marker
    end: Marker
    opening: tuple[int, ...] = ()  # tokens by which it may begin where the content is constrained; (): it may not
    budget: int | None = None  # tokens, after which it is ended
    closing: tuple[int, ...] = ()  # tokens that end it


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A constrained part of free content: a tool call, say."""

    signs: tuple[Marker, ...]  # each tells that it has begun
    grammar: str  # from the token on in which a sign begins
    only_first: bool = False  # signs count where the content begins, and nowhere else


@dataclass(frozen=True, kw_only=True, slots=True)
class GuidanceSpec:
    """A grammar is one that llguidance reads: Lark, or JSON of its own."""

    content: str = ""  # the grammar of all that is no thinking; "": the content is free
    thinking: Thinking | None = None
    sections: tuple[Section, ...] = ()
    most: int = 1  # sections, after which the output ends
    then_end: bool = False  # it ends after the first one

    def to_json(self) -> str:
        """Equal specs give equal texts."""
        return json.dumps(asdict(self), separators=(",", ":"), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> "GuidanceSpec":
        """The reverse. Raises InvalidParameter."""
        try:
            values = json.loads(text)
            thinking, sections = values.pop("thinking"), values.pop("sections")
            return GuidanceSpec(
                thinking=Thinking(**_with_tuples(thinking)) if thinking is not None else None,
                sections=tuple(Section(**_with_tuples(section)) for section in sections),
                **values,
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InvalidParameter(f"the guidance cannot be read: {str(error)[:_KEPT]}", "guidance") from error


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: _tuple(value) for name, value in values.items()}


def _tuple(value: Any) -> Any:
    return tuple(map(_tuple, value)) if isinstance(value, list) else value
