"""JSON that comes in pieces: how far it is valid so far, and where it is complete."""

import re
from typing import Literal

MAX_DEPTH = 128
_MAX_NUMBER = 1024  # characters
_PLAIN = re.compile(r'[^"\\\x00-\x1f\ud800-\udfff]*')  # a lone surrogate is a token that is a delimiter
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_NUMBER_BEGUN = re.compile(r"-?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?(?:(?<=[0-9])[eE][+-]?[0-9]*)?)?")
_WORDS = {"t": "rue", "f": "alse", "n": "ull"}
_Expected = Literal[
    "object", "value", "value or end", "key", "key or end", "colon", "comma", "string", "word", "number", "nothing"
]


class JsonReader:
    """Reads one JSON object, or whatever begins with one of `openers`."""

    def __init__(self, openers: str = "{") -> None:
        self._openers = openers
        self._expected: _Expected = "object"
        self._closers: list[str] = []  # of the brackets that are open
        self._in_key = False
        self._rest = ""  # of a word
        self._number = ""  # as far as it came
        self._escape = 0  # hexadecimal digits that are yet to come; -1: the letter after a backslash

    @property
    def done(self) -> bool:
        """Whether it is complete."""
        return self._expected == "nothing"

    def take(self, text: str, at: int) -> int:
        """Where reading from `at` stops: at its end, at what is no JSON, or at the end of the text so far."""
        while at < len(text) and not self.done:
            if self._expected == "string" and not self._escape:
                plain = _PLAIN.match(text, at)
                at = plain.end() if plain else at
                if at == len(text):
                    break
            if not self._step(text[at]):
                break
            at += 1
        return at

    def _step(self, letter: str) -> bool:
        """Whether the letter may come now; if so, it has come."""
        if self._expected == "string":
            return self._in_string(letter)
        if self._expected == "word":
            expected, self._rest = letter == self._rest[0], self._rest[letter == self._rest[0] :]
            if expected and not self._rest:
                self._expected = "comma"
            return expected
        if self._expected == "number":
            if len(self._number) < _MAX_NUMBER and _NUMBER_BEGUN.fullmatch(self._number + letter):
                self._number += letter
                return True
            if not _NUMBER.fullmatch(self._number):
                return False
            self._expected = "comma"
        if letter in " \t\n\r" and self._expected != "object":
            return True
        return self._structure(letter)

    def _structure(self, letter: str) -> bool:
        expected = self._expected
        if expected == "object":
            return letter in self._openers and self._begin_value(letter)
        if expected in ("value", "value or end") and self._begin_value(letter):
            return True
        if expected in ("key", "key or end") and letter == '"':
            self._expected, self._in_key = "string", True
        elif expected == "colon" and letter == ":":
            self._expected = "value"
        elif expected == "comma" and letter == ",":
            self._expected = "key" if self._closers[-1] == "}" else "value"
        elif expected in ("comma", "key or end", "value or end") and letter == self._closers[-1]:
            self._closers.pop()
            self._expected = "comma" if self._closers else "nothing"
        else:
            return False
        return True

    def _begin_value(self, letter: str) -> bool:
        if letter in "{[" and len(self._closers) < MAX_DEPTH:
            self._closers.append("}" if letter == "{" else "]")
            self._expected = "key or end" if letter == "{" else "value or end"
        elif letter == '"':
            self._expected, self._in_key = "string", False
        elif letter in _WORDS:
            self._expected, self._rest = "word", _WORDS[letter]
        elif letter in "-0123456789":
            self._expected, self._number = "number", letter
        else:
            return False
        return True

    def _in_string(self, letter: str) -> bool:
        if self._escape > 0:
            self._escape -= letter in "0123456789abcdefABCDEF"
            return letter in "0123456789abcdefABCDEF"
        if self._escape < 0:
            self._escape = 4 if letter == "u" else 0
            return letter in '"\\/bfnrtu'
        if letter == "\\":
            self._escape = -1
        elif letter == '"':
            self._expected = "colon" if self._in_key else "comma"
        else:
            return False
        return True
