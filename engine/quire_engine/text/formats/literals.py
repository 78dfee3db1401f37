"""Arguments as literals of a language that is almost JSON (Python's, Gemma's), read into JSON."""

import ast
import math
import re
from collections.abc import Callable

from quire_engine.text.formats.facts import Literals, Pieces, Space, Text
from quire_engine.text.formats.json_reader import MAX_DEPTH
from quire_engine.text.formats.matching import Reading, Source, Waiting
from quire_engine.text.formats.schema import dumped, escaped

_WORD = re.compile(r"[\w.+-]*", re.ASCII)
_MAX_WORD = 256
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_WORDS = {"true": "true", "True": "true", "false": "false", "False": "false", "null": "null", "None": "null"}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "0": "\0", "\n": ""}
_DIGITS = {"x": 2, "u": 4, "U": 8}
_SPACE: Pieces = (Space(),)
_COMMA: Pieces = (Space(), Text(","))
_PLAIN = re.compile("[^\"'\\\\\ud800-\udfff]+")


class LiteralReader:
    """Reads the arguments of one call. What breaks off has been told as far as it is certain."""

    def __init__(self, source: Source, style: Literals, tell: Callable[[str], None]) -> None:
        self._source = source
        self._style = style
        self._tell = tell

    def arguments(self, after: Pieces) -> Reading:
        """Names and values up to what closes the call, which is not read; whether it is closed."""
        return (yield from self._pairs(after, 0, bare=True))

    def _pairs(self, close: Pieces, depth: int, *, bare: bool) -> Reading:
        comma = "{"
        while (yield from self._source.find(_SPACE + close)) is None:
            if comma != "{" and (yield from self._source.take(_COMMA)) is None:
                return False
            if comma != "{" and (yield from self._source.find(_SPACE + close)) is not None:
                break
            yield from self._source.take(_SPACE)
            begun = comma
            if bare:
                name = yield from self._word()
                if not name:
                    return False
                self._tell(f"{comma}{dumped(name)}: ")
            else:
                self._tell(begun)
                if not (yield from self._string()):
                    return False
                self._tell(": ")
            assign = self._style.assign if bare else ":"
            if (yield from self._source.take((Space(), Text(assign), Space()))) is None:
                return False
            if not (yield from self._value(depth)):
                return False
            comma = ", "
        self._tell("{}" if comma == "{" else "}")
        return True

    def _value(self, depth: int) -> Reading:
        source = self._source
        if not (yield from source.more()):
            return False
        letter = source.text[source.at]
        if letter in "[({":
            if depth >= MAX_DEPTH:
                return False
            source.at += 1
            if letter == "{":
                if not (yield from self._pairs((Text("}"),), depth + 1, bare=self._style.bare_keys)):
                    return False
                yield from source.take((Space(), Text("}")))
                return True
            return (yield from self._items("]" if letter == "[" else ")", depth + 1))
        if (yield from self._string()):
            return True
        word = yield from self._word()
        written = _atom(word)
        if written is None:
            return False
        self._tell(written)
        return True

    def _items(self, closer: str, depth: int) -> Reading:
        close: Pieces = (Space(), Text(closer))
        comma = "["
        self._tell("[")
        while (yield from self._source.take(close)) is None:
            if comma != "[":
                if (yield from self._source.take(_COMMA)) is None:
                    return False
                if (yield from self._source.take(close)) is not None:
                    break
                self._tell(comma)
            yield from self._source.take(_SPACE)
            if not (yield from self._value(depth)):
                return False
            comma = ", "
        self._tell("]")
        return True

    def _string(self) -> Reading:
        """Whether one is here and whole. If there is none, nothing has been read."""
        source, quote = self._source, self._style.quote
        if quote and (yield from source.take(quote)) is not None:
            close = quote
        elif (yield from source.more()) and source.text[source.at] in "\"'":
            close = (Text(source.text[source.at]),)
            source.at += 1
        else:
            return False
        self._tell('"')
        while (yield from source.more()):
            plain = _PLAIN.match(source.text, source.at) if close != quote or not isinstance(quote[0], Text) else None
            if plain is not None:
                self._tell(escaped(plain[0]))
                source.at = plain.end()
                continue
            if (yield from source.take(close)) is not None:
                self._tell('"')
                return True
            letter = source.text[source.at]
            if source.cut or "\ud800" <= letter <= "\udfff":
                break
            source.at += 1
            if letter == "\\" and close != quote:
                letter = yield from self._escape()
            self._tell(escaped(letter))
        return False

    def _escape(self) -> Waiting[str]:
        source = self._source
        if not (yield from source.more()):
            return ""
        letter = source.text[source.at]
        source.at += 1
        if letter in _DIGITS:
            digits = ""
            while len(digits) < _DIGITS[letter] and (yield from source.more()):
                if source.text[source.at] not in "0123456789abcdefABCDEF":
                    break
                digits += source.text[source.at]
                source.at += 1
            code = int(digits, 16) if len(digits) == _DIGITS[letter] else 0x110000
            return chr(code) if code < 0x110000 else f"\\{letter}{digits}"
        return letter if letter in "\\\"'" else _ESCAPES.get(letter, f"\\{letter}")

    def _word(self) -> Waiting[str]:
        """A name or a number."""
        source = self._source
        while True:
            found = _WORD.match(source.text, source.at)
            end = source.at if found is None else found.end()
            if end < len(source.text) or source.ended or end - source.at > _MAX_WORD:
                break
            yield
        word = source.text[source.at : end]
        if end == len(source.text) or len(word) > _MAX_WORD:
            source.cut = end == len(source.text)  # it may be the beginning of another word
            return ""
        source.at = end
        return word


def _atom(word: str) -> str | None:
    """A word as JSON; None: it is none."""
    if word in _WORDS or _NUMBER.fullmatch(word):
        return _WORDS.get(word, word)
    try:
        number = ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return None
    if isinstance(number, int) or (isinstance(number, float) and math.isfinite(number)):
        return str(number)
    return None
