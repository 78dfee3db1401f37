"""A model's vocabulary as grammars see it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

_MARK = b"\xff"  # in no UTF-8; llguidance, too, writes tokens that are no text like this


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Delimiters are tokens that are no text: they stand where a grammar or a marker names them, and nowhere else."""

    tokens: Sequence[bytes]  # what each id writes
    delimiters: frozenset[int]
    ends: tuple[int, ...]  # tokens that end an output
    size: int  # of the logits, which may have more ids than there are tokens, or fewer
    encode: Callable[[str], list[int]]

    def written(self, token: int) -> bytes:
        """What a token writes; of a delimiter something that no text contains."""
        if token in self.delimiters:
            return marked(token)
        return self.tokens[token].replace(_MARK, b"\xfe") if token < len(self.tokens) else b""

    @cached_property
    def breaks(self) -> tuple[int, ...]:
        """Tokens that write one line break or two, and nothing else."""
        return tuple(token for token, word in enumerate(self.tokens[: self.size]) if word in (b"\n", b"\n\n"))

    @cached_property
    def compiled(self) -> Any:
        """For llguidance. Takes a second for large vocabularies."""
        from llguidance import LLTokenizer, TokenizerWrapper

        return LLTokenizer(TokenizerWrapper(_Words(self)), eos_token=list(self.ends))


def marked(token: int) -> bytes:
    """A delimiter among bytes of text."""
    return _MARK + token.to_bytes(4, "big")


class _Words:
    """As llguidance asks for it."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        size = vocabulary.size  # all ids get a word: llguidance makes its masks as wide as there are words
        known = [*vocabulary.tokens[:size], *[b""] * (size - len(vocabulary.tokens))]
        unused = {token for token, word in enumerate(known) if not word or _MARK in word}
        self.tokens = [f"<unused {token}>".encode() if token in unused else word for token, word in enumerate(known)]
        self._special = {token for token in vocabulary.delimiters | unused if token < size}
        self.special_token_ids = sorted(self._special)
        self.eos_token_id = vocabulary.ends[0]
        self._encode = vocabulary.encode

    def __call__(self, text: str) -> list[int]:
        """Tokens that write a text which a grammar has: by no delimiter that is spelled the same."""
        tokens = self._encode(text)
        return tokens if self._special.isdisjoint(tokens) else self._longest(text.encode())

    def _longest(self, text: bytes) -> list[int]:
        """From left to right the longest token each time."""
        found: list[int] = []
        at = 0
        while at < len(text):
            ends = range(min(len(text), at + self._most), at, -1)
            end = next((end for end in ends if text[at:end] in self._by_word), None)
            if end is None:
                break  # a vocabulary without this byte
            found.append(self._by_word[text[at:end]])
            at = end
        return found

    @cached_property
    def _by_word(self) -> dict[bytes, int]:
        return {word: token for token, word in enumerate(self.tokens) if token not in self._special}

    @cached_property
    def _most(self) -> int:
        return max(map(len, self._by_word))
