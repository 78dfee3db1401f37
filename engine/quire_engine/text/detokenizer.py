"""Tokens to text, all at once or one after the other: what a token writes is looked up as bytes, and bytes become
characters as they are completed.

A token of a byte-level vocabulary, or of one that falls back on bytes, may be a part of a character. Its bytes are
known all the same, so a character that its neighbour completes appears whole, one that nobody completes is U+FFFD, and
no more than three bytes ever wait.
"""

import codecs
import re
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_EACH_BYTE = "quire.each_byte"
_LONGEST_PART = 3  # bytes of an unfinished character, and so tokens


def _each_byte(error: UnicodeError) -> tuple[str, int]:
    """U+FFFD for each byte of what is no character, as SentencePiece writes it."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(_EACH_BYTE, _each_byte)


def _byte_letters() -> dict[str, int]:
    """The letters by which byte-level vocabularies (GPT-2's and all after it) spell the 256 bytes."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


class TokenTable(dict[int, bytes]):
    """Token id → the bytes it adds to a text that has begun; each is worked out when it is first asked for.

    It is asked of the tokenizer's own decoder, with neighbours on both sides. Ids without a token write nothing.
    """

    def __init__(self, fast: Any) -> None:
        """`fast`: a `tokenizers.Tokenizer`."""
        super().__init__()
        self._spelling: Callable[[int], str | None] = fast.id_to_token
        self._write: Callable[[list[str]], str] = fast.decoder.decode if fast.decoder is not None else " ".join
        self._letters = _byte_letters() if self._write(["aĠa"]) == "a a" else {}
        self._falls_back = self._write(["<0xC3>", "<0xA9>"]) == "é"
        self.errors = _EACH_BYTE if self._falls_back else "replace"
        self._before = self._write(["a"])
        self._after = self._write(["a", "a"])[len(self._before) :]
        added = fast.get_added_tokens_decoder()
        self.added = {token: one.content for token, one in added.items()}
        self.special = frozenset(token for token, one in added.items() if one.special)

    def __missing__(self, token: int) -> bytes:
        spelling = self._spelling(token)
        written = b"" if spelling is None else self._part(spelling)
        if written is None:
            whole = self._write(["a", str(spelling), "a"])
            written = whole[len(self._before) : len(whole) - len(self._after)].encode()
        self[token] = written
        return written

    def knows(self, token: int) -> bool:
        """Whether the id has a token."""
        return self._spelling(token) is not None

    def opening(self, token: int) -> bytes:
        """What a token writes at the beginning of a text, where many vocabularies leave out a space."""
        spelling = self._spelling(token)
        if spelling is None or self._part(spelling) is not None:
            return self[token]
        whole = self._write([spelling, "a"])
        return whole[: len(whole) - len(self._after)].encode()

    def text(self, tokens: Sequence[int], *, skip_special_tokens: bool) -> str:
        """What all of them write, at once."""
        kept = [token for token in tokens if token not in self.special] if skip_special_tokens else tokens
        first = next((place for place, token in enumerate(kept) if self.knows(token)), len(kept))
        written = [self.opening(token) for token in kept[first : first + 1]]
        return b"".join(written + [self[token] for token in kept[first + 1 :]]).decode("utf-8", self.errors)

    def spelled(self, token: int, *, begins: bool = False) -> str:
        """A token as text; a part of a character as OpenAI's API spells it: `bytes:\\xc3`."""
        written = self.opening(token) if begins else self[token]
        try:
            return written.decode()
        except UnicodeDecodeError:
            return "bytes:" + written.decode("utf-8", "backslashreplace")

    def _part(self, spelling: str) -> bytes | None:
        """The bytes of a token that is not whole characters."""
        if self._falls_back and (found := _FALLBACK.fullmatch(spelling)):
            written = bytes([int(found[1], 16)])
        elif self._letters and all(letter in self._letters for letter in spelling):
            written = bytes(self._letters[letter] for letter in spelling)
        else:
            return None
        try:
            written.decode()
        except UnicodeDecodeError:
            return written
        return None


class Detokenizer:
    """Tokens in one after the other, text out as soon as it is whole characters."""

    def __init__(self, table: TokenTable, skip_special_tokens: bool, spaces_between_special_tokens: bool) -> None:
        self._table = table
        self._skipped = table.special if skip_special_tokens else frozenset[int]()
        self._bare = {} if skip_special_tokens or spaces_between_special_tokens else table.added
        self._last_was_added = False
        self.begun = False  # whether a token has written, be it nothing
        self._decoder = codecs.getincrementaldecoder("utf-8")(table.errors)
        self.length = 0  # characters written so far

    def step(self, token: int) -> str:
        """The characters this token completes; none while one is unfinished."""
        if token in self._skipped:
            return ""
        if self.begun:
            written = self._table[token]
        else:
            written = self._table.opening(token)
            self.begun = self._table.knows(token)
        if self._bare:
            added = self._bare.get(token)
            if added is not None and self._last_was_added:
                written = added.encode()  # without the space that some vocabularies put before a word
            self._last_was_added = added is not None
        text = self._decoder.decode(written)
        self.length += len(text)
        return text

    def follow(self, tokens: Sequence[int]) -> None:
        """Has the text begin where these end, as an output begins where its prompt ends."""
        table, skipped = self._table, self._skipped
        self.begun = any(token not in skipped and table.knows(token) for token in tokens)
        visible = (token for token in reversed(tokens) if token not in skipped and table[token])
        for token in reversed(list(islice(visible, _LONGEST_PART))):
            self.step(token)
        self.length = 0

    def flush(self) -> str:
        """What is left at the end: an unfinished character, as U+FFFD."""
        text = self._decoder.decode(b"", True)
        self.length += len(text)
        return text
