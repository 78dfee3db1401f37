"""The vocabulary that a GGUF file carries (`tokenizer.ggml.*`), checked: tokens, what they are, and which of them end a
generation."""

import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from quire_engine.errors import ModelError
from quire_engine.weights.gguf.file import shown

log = logging.getLogger(__name__)


class Kind(IntEnum):
    """What a token is, by ggml's numbers."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Tokens that end a generation, by what files call them where no key says so.
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_END_NAMES = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
)
# What follows a filled-in middle: another file's text, or padding.
_FILL_ENDS = {
    "fim_pad_token_id": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep_token_id": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep_token_id": ("<|file_sep|>",),
}
# Files give these types that are wrong: markers of a filled-in middle are never text, and the markers of gpt-oss's
# channels are read from the answer.
_CONTROL_NAMES = (
    *("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>"),
    *("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>"),
    *("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>"),
    *("<|prefix|>", "<|suffix|>", "<|middle|>"),
)
_TEXT_NAMES = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")

_DEFAULT_IDS: dict[str, dict[str, int]] = {
    "llama": {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0},
    "bert": {
        "bos_token_id": 101,
        "unknown_token_id": 100,
        "seperator_token_id": 102,
        "padding_token_id": 0,
        "mask_token_id": 103,
    },
    "t5": {"eos_token_id": 1, "unknown_token_id": 2, "padding_token_id": 0},
}
_TOKEN_KEYS = (
    *_END_KEYS,
    "bos_token_id",
    "cls_token_id",
    "unknown_token_id",
    "seperator_token_id",  # as ggml spells it
    "padding_token_id",
    "mask_token_id",
    *_FILL_ENDS,
)
_FLAGS = (
    "add_bos_token",
    "add_eos_token",
    "add_sep_token",
    "add_space_prefix",
    "remove_extra_whitespaces",
    "normalizer.lowercase",
    "normalizer.strip_accents",
)
_OTHERS = ("model", "pre", "tokens", "token_type", "scores", "merges", "precompiled_charsmap")
_WITHOUT_EFFECT = (  # on what a text's tokens are
    "token_type_count",
    *(f"{name}_token_id" for name in ("fim_pre", "fim_mid", "fim_suf", "prefix", "middle", "suffix")),
)


@dataclass(frozen=True)
class Vocabulary:
    """`tokenizer.*` of a file's metadata. Raises ModelError, which names the key, for what is not sound."""

    path: Path
    metadata: Mapping[str, Any]

    def fault(self, key: str, what: str, mend: str = "convert it again, or give --tokenizer") -> ModelError:
        """The error that names a key."""
        return ModelError(f"{self.path.name}: tokenizer.ggml.{key} {what}; {mend}")

    @cached_property
    def model(self) -> str:
        """The kind of tokenizer, by ggml's name."""
        self._name_unread()
        return self._text("model")

    @cached_property
    def pre(self) -> str:
        """How text is cut into words; empty where the file does not say."""
        return self._text("pre", "")

    @cached_property
    def tokens(self) -> list[str]:
        """By id."""
        tokens: list[str] = self._array("tokens", str, "texts")
        if not tokens:
            raise self.fault("tokens", "is empty")
        named = [token or f"[EMPTY_{at}]" for at, token in enumerate(tokens)]
        if len(set(named)) < len(named):
            raise self.fault("tokens", f"has {Counter(named).most_common(1)[0][0][:80]!r} twice")
        return named

    @cached_property
    def ids(self) -> dict[str, int]:
        """By token."""
        return {token: at for at, token in enumerate(self.tokens)}

    @cached_property
    def kinds(self) -> list[Kind]:
        """By id."""
        names = {int(kind): kind for kind in Kind}
        numbers = self._array("token_type", int, "integers", optional=True)
        kinds = [names.get(number, Kind.UNDEFINED) for number in numbers] or [Kind.NORMAL] * len(self.tokens)
        for name in (*_END_NAMES, *_CONTROL_NAMES, *(name for names in _FILL_ENDS.values() for name in names)):
            if name in self.ids:
                kinds[self.ids[name]] = Kind.CONTROL
        for name in _TEXT_NAMES:
            if name in self.ids:
                kinds[self.ids[name]] = Kind.USER_DEFINED
        if self._turns_go_on:
            kinds[self.ids["<|end|>"]] = Kind.USER_DEFINED
        if self._has_plain_s:
            kinds[self.ids["</s>"]] = Kind.NORMAL
        return kinds

    @cached_property
    def scores(self) -> list[float]:
        """By id; empty where there are none."""
        numbers = self._array("scores", (int, float), "numbers", optional=True)
        if not all(map(math.isfinite, numbers)):
            raise self.fault("scores", "has numbers that are not finite")
        return [float(number) for number in numbers]

    @cached_property
    def merges(self) -> list[tuple[str, str]]:
        """In the order in which they are made, each once."""
        made: dict[tuple[str, str], None] = {}
        ids = self.ids
        for at, merge in enumerate(self._array("merges", str, "texts", of_tokens=False)):
            space = merge.find(" ", 1)
            pair = merge[:space], merge[space + 1 :]
            if space < 0 or pair[0] not in ids or pair[1] not in ids or "".join(pair) not in ids:
                raise self.fault("merges", f"has {merge[:80]!r} (number {at}), which is not of tokens or makes none")
            made[pair] = None
        return list(made)

    @cached_property
    def charsmap(self) -> bytes:
        """SentencePiece's table of what characters become; empty where there is none."""
        numbers = self._array("precompiled_charsmap", int, "bytes", optional=True, of_tokens=False)
        if not all(-128 <= number < 256 for number in numbers):
            raise self.fault("precompiled_charsmap", "is not made of bytes")
        table = bytes(number & 255 for number in numbers)
        if table and not _is_charsmap(table):
            raise self.fault("precompiled_charsmap", "is no table of SentencePiece's")
        return table

    def token(self, key: str) -> int | None:
        """A special token's id, by its key."""
        given = self.metadata.get(f"tokenizer.ggml.{key}")
        if given is None:
            default = _DEFAULT_IDS.get(str(self.metadata.get("tokenizer.ggml.model")), {}).get(key)
            return default if default is not None and default < len(self.tokens) else None
        if type(given) is not int:
            raise self.fault(key, f"is {shown(given)}, which is no token id", "convert it again")
        if given == -1 or given == 0xFFFFFFFF:  # as converters write that there is none
            return None
        if not 0 <= given < len(self.tokens):
            raise self.fault(key, f"is {given}, but there are {len(self.tokens)} tokens", "convert it again")
        return given

    def flag(self, key: str, default: bool) -> bool:
        """One that the file may leave out."""
        given = self.metadata.get(f"tokenizer.ggml.{key}", default)
        if type(given) is not bool:
            raise self.fault(key, f"is {shown(given)}, neither true nor false")
        return given

    @cached_property
    def chat_template(self) -> str | dict[str, str] | None:
        """The file's; by name where it has several."""
        found = {}
        for key, value in self.metadata.items():
            if key == "tokenizer.chat_template" or key.startswith("tokenizer.chat_template."):
                if type(value) is not str:
                    raise ModelError(f"{self.path.name}: {key} is no text; give one with --chat-template")
                found[key.removeprefix("tokenizer.chat_template").removeprefix(".") or "default"] = value
        return found.get("default") if found.keys() <= {"default"} else found

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a generation, in order: of the end of a text, a turn or a message by their keys, control
        tokens that are known by name to do so, and what parts files for models that fill in a middle."""
        found = {self.token(key) for key in _END_KEYS} | {self.ids.get(name) for name in _END_NAMES}
        for key, names in _FILL_ENDS.items():
            given = self.token(key)
            found |= {given} if given is not None else {self.ids.get(name) for name in names}
        if self._turns_go_on:
            found.discard(self.ids["<|end|>"])
        if self._has_plain_s:
            found.discard(self.ids["</s>"])
        return tuple(sorted(token for token in found if token is not None))

    @property
    def _turns_go_on(self) -> bool:
        """Whether `<|end|>` ends a message, after which the turn's next one comes."""
        has = self.ids.__contains__
        ends_otherwise = (has("<|call|>") or has("<|calls|>")) and (has("<|return|>") or has("<|flush|>"))
        return ends_otherwise and has("<|end|>")

    @property
    def _has_plain_s(self) -> bool:
        """Whether `</s>` is the name of a tag in these."""
        return "</s>" in self.ids and ("<|tool_response>" in self.ids or "<|plamo:eos|>" in self.ids)

    def _text(self, key: str, default: str | None = None) -> str:
        value = self.metadata.get(f"tokenizer.ggml.{key}", default)
        if type(value) is not str:
            raise self.fault(key, "is missing" if value is None else f"is {shown(value)}, no text")
        return value

    def _array(
        self,
        key: str,
        kind: type | tuple[type, ...],
        noun: str,
        *,
        optional: bool = False,
        of_tokens: bool = True,
    ) -> list[Any]:
        """`of_tokens`: there is one for each token."""
        value = self.metadata.get(f"tokenizer.ggml.{key}")
        if value is None:
            if optional:
                return []
            raise self.fault(key, "is missing")
        if type(value) is not list or not all(isinstance(item, kind) and type(item) is not bool for item in value):
            raise self.fault(key, f"is no list of {noun}")
        if key != "tokens" and of_tokens and len(value) != len(self.tokens):
            raise self.fault(key, f"has {len(value)} {noun} for {len(self.tokens)} tokens")
        return value

    def _name_unread(self) -> None:
        known = {f"tokenizer.ggml.{key}" for key in (*_TOKEN_KEYS, *_FLAGS, *_OTHERS, *_WITHOUT_EFFECT)}
        unread = [key for key in self.metadata if key.startswith("tokenizer.ggml.") and key not in known]
        if unread:
            log.warning("%s: %s is not understood and has no effect", self.path.name, shown(sorted(unread)))


def _is_charsmap(table: bytes) -> bool:
    """Whether every way through it stays within: its length in bytes, a trie (XOR-compressed double array) of 32-bit
    units, and the texts that the trie's leaves point at, each with a zero byte at its end."""
    size, texts = int.from_bytes(table[:4], "little"), table[4 + int.from_bytes(table[:4], "little") :]
    if size < 4 or size % 4 or not texts.endswith(b"\0"):
        return False
    try:
        texts.decode()
    except UnicodeDecodeError:
        return False
    units = np.frombuffer(table, "<u4", size // 4, 4).astype(np.int64)
    is_node = units >> 31 == 0
    after = np.arange(len(units)) ^ ((units >> 10) << ((units & 512) >> 6))
    if ((after | 255)[is_node] >= len(units)).any():  # whatever byte comes next
        return False
    points_at = units[after[is_node & (units >> 8 & 1 == 1)]] & 0x7FFFFFFF
    begins = np.frombuffer(b"\0" + texts, np.uint8)[:-1] == 0
    return bool((points_at < len(texts)).all() and begins[points_at].all())
