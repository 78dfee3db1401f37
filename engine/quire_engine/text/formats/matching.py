"""Pieces of a format looked for in a text that is still growing."""

from collections.abc import Collection, Generator, Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeVar

from quire_engine.text.formats.facts import Blank, Either, Mark, Maybe, Pieces, Space, Text, leading

MAX_SPACE = 32  # characters of whitespace in one place
_MAX_INDEX = 6
_MAX_ID = 64
_NAME_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.")
_ID_LETTERS = _NAME_LETTERS - {"."}
_DIGITS = frozenset("0123456789")
_SPACES = frozenset(" \t\n\r")
Result = TypeVar("Result")
Waiting: TypeAlias = Generator[None, None, Result]  # yields where it needs more text than there is
Reading: TypeAlias = Waiting[bool]


@dataclass(frozen=True, slots=True)
class Found:
    """Pieces that stand in the text up to `end`. `name`: the tool's among them, or ''. `cut`: the text ended where it
    began to be read in a way that would have been preferred."""

    end: int
    name: str = ""
    cut: bool = False


def find(pieces: Pieces, text: str, at: int, *, names: Collection[str] = (), ended: bool) -> Found | bool:
    """The pieces at this place of a text; False: they are not there; True: it would take more text to tell.

    What is found stays so however the text goes on: of several ways to read it, the first that is not ruled out counts.
    """
    undecided = False
    for found in _ways(pieces, text, Found(at), names):
        if found is not None:
            return replace(found, cut=undecided)
        if not ended:
            return True
        undecided = True
    return undecided


def _ways(pieces: Pieces, text: str, done: Found, names: Collection[str]) -> Iterator[Found | None]:
    """The ways to read the pieces, the preferred one first; None: one that more text may still make possible."""
    if not pieces:
        yield done
        return
    piece, rest = pieces[0], pieces[1:]
    if isinstance(piece, Maybe):
        yield from _ways(piece.pieces + rest, text, done, names)
        yield from _ways(rest, text, done, names)
    elif isinstance(piece, Either):
        for option in piece.options:
            yield from _ways(option + rest, text, done, names)
    elif isinstance(piece, Text | Mark):
        here = text[done.end : done.end + len(piece.text)]
        if here == piece.text:
            yield from _ways(rest, text, Found(done.end + len(here), done.name), names)
        elif piece.text.startswith(here):
            yield None
    elif isinstance(piece, Space):
        end = _run(text, done.end, _SPACES, MAX_SPACE)
        if end == len(text) and end - done.end < MAX_SPACE:
            yield None
        yield from _ways(rest, text, Found(end, done.name), names)
    elif piece is Blank.NAME:
        longest = max(map(len, names), default=0)
        end = _run(text, done.end, _NAME_LETTERS, longest + 1)
        if end == len(text) and end - done.end <= longest:
            if any(name.startswith(text[done.end : end]) for name in names):
                yield None  # what is a tool's name so far may be another one's in the end
        elif (name := text[done.end : end]) in names:
            yield from _ways(rest, text, Found(end, name), names)
    else:
        letters, most = (_DIGITS, _MAX_INDEX) if piece is Blank.INDEX else (_ID_LETTERS, _MAX_ID)
        end = _run(text, done.end, letters, most)
        if end == len(text) and end - done.end < most:
            yield None
        elif end > done.end:
            yield from _ways(rest, text, Found(end, done.name), names)


class Source:
    """A text that grows while generators read it; they yield where they need more of it than there is."""

    def __init__(self) -> None:
        self.text = ""
        self.at = 0  # what lies before has been read
        self.ended = False
        self.cut = False  # whether it ended in the middle of what was looked for

    def push(self, text: str) -> None:
        """More of it."""
        self.text = self.text[self.at :] + text
        self.at = 0

    def find(self, pieces: Pieces, names: Collection[str] = ()) -> Waiting[Found | None]:
        """The pieces here, if they come."""
        while True:
            found = find(pieces, self.text, self.at, names=names, ended=self.ended)
            if not isinstance(found, bool):
                self.cut = found.cut or (self.cut and found.end == self.at)
                return found
            if not found:
                return None
            if self.ended:
                self.cut = True
                return None
            yield

    def take(self, pieces: Pieces, names: Collection[str] = ()) -> Waiting[Found | None]:
        """The same, and goes on behind them."""
        found = yield from self.find(pieces, names)
        if found is not None:
            self.at = found.end
        return found

    def more(self) -> Reading:
        """Waits for a letter; whether there is one."""
        while self.at == len(self.text) and not self.ended:
            yield
        return self.at < len(self.text)


def _run(text: str, at: int, letters: frozenset[str], most: int) -> int:
    """Where a run of these letters ends, or its first `most`."""
    end = at
    while end < len(text) and end - at < most and text[end] in letters:
        end += 1
    return end


def firsts(pieces: Pieces) -> set[str]:
    """The letters that pieces begin with, whitespace aside."""
    piece = leading(pieces)
    if piece is None:
        return set()
    rest = pieces[pieces.index(piece) + 1 :]
    if isinstance(piece, Text | Mark):
        return {piece.text[0]}
    assert isinstance(piece, Maybe | Either), "a delimiter begins with a text"
    options = (piece.pieces, ()) if isinstance(piece, Maybe) else piece.options
    return {letter for option in options for letter in firsts(option + rest)}
