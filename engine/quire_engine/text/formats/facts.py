"""What a family of models writes around its reasoning and its tool calls, as facts.

Both the parser and the grammar are made of these pieces, so that what is masked, streamed, whole and resumed agree.
Reasoning and calls are facts of their own: a model's format is one of each.
"""

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Text:
    """Exactly this."""

    text: str


@dataclass(frozen=True, slots=True)
class Mark:
    """A delimiter: only one added token of the vocabulary where it has one spelled so, else the text."""

    text: str


@dataclass(frozen=True, slots=True)
class Space:
    """Whitespace, which models vary: any is read, this or none is written under a mask."""

    usual: str = " "


class Blank(Enum):
    """What differs from call to call."""

    NAME = "name"  # a tool's
    INDEX = "index"  # digits
    ID = "id"  # letters and digits, as the family makes them


@dataclass(frozen=True, slots=True)
class Maybe:
    """These or nothing."""

    pieces: "Pieces"


@dataclass(frozen=True, slots=True)
class Either:
    """The first of these that fits; the first is what is written under a mask."""

    options: tuple["Pieces", ...]


Part: TypeAlias = Text | Mark | Space | Blank | Maybe | Either
Pieces: TypeAlias = tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Json:
    """A JSON object as it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tagged:
    """Pairs of a key and a value between tags. Values become JSON by the tool's schema: strings stand bare."""

    key: Pieces  # before a key
    value: Pieces  # between a key and its value
    close: Pieces  # after a value, up to the next key


@dataclass(frozen=True, kw_only=True, slots=True)
class Literals:
    """Names with values, and commas between them, in the literals of a language that is almost JSON."""

    assign: str  # between a name and its value
    words: tuple[str, str, str]  # true, false and null
    quote: Pieces = ()  # a mark before and after a string, which stands as it is; none: quotes and escapes as Python's
    bare_keys: bool = False  # whether keys of nested objects are names with `assign` too; else strings with colons


Style: TypeAlias = Json | Tagged | Literals


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One call: what comes up to its arguments, with the NAME among it, the arguments, and what closes it."""

    before: Pieces
    arguments: Style
    after: Pieces = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """Where calls are written. `only_first`: counts only where content begins. `repeats`: another may follow."""

    begin: Pieces
    call: Call
    between: Pieces | None = None  # two calls of one section; None: a section holds one
    end: Pieces = ()
    only_first: bool = False
    repeats: bool = False
    apart: Pieces = ()  # what is written between two sections


@dataclass(frozen=True, kw_only=True, slots=True)
class Calls:
    """How calls are written; all are read, and under a mask the first is written that the vocabulary has marks for."""

    sections: tuple[Section, ...]
    dropped: tuple[Pieces, ...] = ()  # what wraps content


@dataclass(frozen=True, kw_only=True, slots=True)
class Reasoning:
    """What opens and closes reasoning. `words`: they are ordinary words, which count only where the output begins."""

    begin: Pieces
    end: Pieces
    words: bool = False
    dropped: tuple[Pieces, ...] = ()  # what wraps content
    before_content: Pieces = ()  # of that, what is written under a mask
    after_content: Pieces = ()
    before_calls: Pieces = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """A family's reasoning and calls, each of which it may lack."""

    name: str
    reasoning: Reasoning | None = None
    calls: Calls | None = None


def leading(pieces: Pieces) -> Part | None:
    """The first piece that is not whitespace."""
    return next((piece for piece in pieces if not isinstance(piece, Space)), None)
