"""A model's vocabulary as grammars see it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

_MARK = b"\xff"  # in no UTF-8


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
        return self.tokens[token] if token < len(self.tokens) else b""

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
        self.tokens = [word if word else f"<unused {token}>".encode() for token, word in enumerate(known)]
        unused = {token for token, word in enumerate(known) if not word}
        self.special_token_ids = sorted(token for token in vocabulary.delimiters | unused if token < size)
        self.eos_token_id = vocabulary.ends[0]
        self._encode = vocabulary.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)
