"""Rules of a grammar in llguidance's Lark, as they are written one after the other."""

import json
from collections.abc import Mapping

from quire_engine.text.formats.facts import Blank, Either, Mark, Maybe, Pieces, Space, Text

_INDEX, _ID = "/[0-9]{1,3}/", "/[a-zA-Z0-9]{9}/"


class Lark:
    """Rules by name, and the tokens that marks stand for."""

    def __init__(self, tokens: Mapping[str, int]) -> None:
        """`tokens`: the character of a mark → its id."""
        self.tokens = tokens
        self.size = 0  # characters of all of them
        self._rules: dict[str, str] = {}
        self._names: set[str] = set()

    def rule(self, name: str, body: str) -> str:
        """Adds one; its name, for use in others."""
        self.size += len(body)
        self._rules[name] = body
        self._names.add(name.split("[")[0])
        return name

    def has(self, name: str) -> bool:
        """Whether there is one of this name."""
        return name.split("[")[0] in self._names

    def text(self) -> str:
        """All of them."""
        return "\n".join(f"{name}: {body}" for name, body in self._rules.items())

    def sequence(self, *parts: Pieces | str) -> str:
        """Pieces, and what is written already, one after the other."""
        written: list[str] = []
        literal = ""
        for part in parts:
            for piece in (part,) if isinstance(part, str) else part:
                if isinstance(piece, Text):
                    literal += piece.text
                    continue
                one = piece if isinstance(piece, str) else self._piece(piece)
                if one:
                    written += [quoted(literal), one] if literal else [one]
                    literal = ""
        return " ".join(written + ([quoted(literal)] if literal or not written else []))

    def until(self, close: Pieces, name: str) -> str:
        """Any text and what closes it, which is not within the text."""
        closing = [
            option for piece in close for option in (piece.options[0] if isinstance(piece, Either) else (piece,))
        ]
        if isinstance(closing[0], Mark):
            return self.sequence("(/(?s:.+)/)?", close)
        self.rule(f"{name.upper()}_TEXT", f"/(?s:.*)/ {self.sequence(close)}")
        return self.rule(f"{name}[lazy]", f"{name.upper()}_TEXT").removesuffix("[lazy]")

    def _piece(self, piece: Mark | Space | Maybe | Either | Blank | Text) -> str:
        if isinstance(piece, Mark):
            return f"<[{self.tokens[piece.text]}]>"
        if isinstance(piece, Space):
            return f"{quoted(piece.usual)}?" if piece.usual else ""
        if isinstance(piece, Maybe):
            return f"({self.sequence(piece.pieces)})?"
        if isinstance(piece, Either):
            return self.sequence(piece.options[0])
        assert piece in (Blank.INDEX, Blank.ID), "names are written by whoever knows which"
        return _INDEX if piece is Blank.INDEX else _ID


def quoted(text: str) -> str:
    """A text as a literal of the grammar."""
    return json.dumps(text, ensure_ascii=False)
