"""Pieces of a format looked for in a text that is still growing."""

from collections.abc import Collection, Generator, Iterator
from dataclasses import dataclass

from quire_engine.text.formats.facts import Blank, Either, Mark, Maybe, Pieces, Space, Text

MAX_SPACE = 32  # characters of whitespace in one place
_MAX_INDEX = 6
_MAX_ID = 64
_NAME_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.")
_ID_LETTERS = _NAME_LETTERS - {"."}
_DIGITS = frozenset("0123456789")
_SPACES = frozenset(" \t\n\r")


@dataclass(frozen=True, slots=True)
class Found:
    """Pieces that stand in the text up to `end`. `name`: the tool's among them, or ''."""

    end: int
    name: str = ""


def find(pieces: Pieces, text: str, at: int, *, names: Collection[str] = (), ended: bool) -> Found | bool:
    """The pieces at this place of a text; False: they are not there; True: it takes more text to tell.

    What is found stays so however the text goes on: of several ways to read it, the first that is not ruled out counts.
    """
    for found in _ways(pieces, text, Found(at), names):
        if found is not None:
            return found
        if not ended:
            return True
    return False


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

    def push(self, text: str) -> None:
        """More of it."""
        self.text = self.text[self.at :] + text
        self.at = 0

    def find(self, pieces: Pieces, names: Collection[str] = ()) -> Generator[None, None, Found | None]:
        """The pieces here, if they come."""
        while True:
            found = find(pieces, self.text, self.at, names=names, ended=self.ended)
            if found is not True:
                return found or None
            yield

    def take(self, pieces: Pieces, names: Collection[str] = ()) -> Generator[None, None, Found | None]:
        """The same, and goes on behind them."""
        found = yield from self.find(pieces, names)
        if found is not None:
            self.at = found.end
        return found

    def more(self) -> Generator[None, None, bool]:
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
