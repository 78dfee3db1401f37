"""Texts to tokens and back, through transformers and tokenizers."""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from quire_kernels.cache_folder import cache_folder

from quire_engine.errors import InvalidParameter, ModelError
from quire_engine.text.detokenizer import Detokenizer, TokenTable
from quire_engine.weights.resolve import ModelFiles

log = logging.getLogger(__name__)


class Tokenizer:
    """One model's tokenizer and chat template. Thread-safe where tokenizers is."""

    def __init__(self, backend: Any, chat_template: str | None = None) -> None:
        """`backend`: a transformers tokenizer. `chat_template` replaces its own."""
        fast = getattr(backend, "backend_tokenizer", None)
        if fast is None:
            raise ModelError(
                f"{type(backend).__name__} has no fast tokenizer; give one with --tokenizer (a folder that has "
                "tokenizer.json)"
            )
        fast.no_truncation()  # a text is refused or computed whole
        fast.no_padding()
        self._backend = backend
        self._fast = fast
        if chat_template is not None:
            backend.chat_template = chat_template
        self._table = TokenTable(fast)
        self.size = len(backend)

    @staticmethod
    def load(files: ModelFiles, *, other: str | None = None, chat_template: str | None = None) -> "Tokenizer":
        """The model's own tokenizer, or `other` (a folder or hub id). Raises ModelError.

        One that has to be converted (GGUF, SentencePiece) is kept converted, since that takes seconds.
        """
        from transformers import AutoTokenizer

        source = Path(other).expanduser() if other else files.folder
        gguf = {"gguf_file": files.gguf_path.name} if files.gguf_path and not other else {}
        kept = _kept_conversion(files.gguf_path) if files.gguf_path and not other else None
        try:
            if kept and (kept / "tokenizer.json").exists():
                return Tokenizer(AutoTokenizer.from_pretrained(str(kept), local_files_only=True), chat_template)
            backend = AutoTokenizer.from_pretrained(
                str(source) if source.exists() else other,
                trust_remote_code=False,
                local_files_only=not other,
                **gguf,
            )
        except Exception as error:  # transformers raises nearly anything here
            raise ModelError(
                f"tokenizer of {other or files.name} cannot be loaded ({type(error).__name__}: {str(error)[:300]}); "
                "give one with --tokenizer"
            ) from error
        if kept:
            _keep(backend, kept)
        return Tokenizer(backend, chat_template)

    @property
    def end_token(self) -> int | None:
        """The tokenizer's own end-of-sequence token."""
        return self._backend.eos_token_id

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be rendered."""
        return bool(self._backend.chat_template)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        return list(self._fast.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_pair(self, first: str, second: str) -> list[int]:
        """Token ids of two texts with whatever the model wants between them."""
        return list(self._fast.encode(first, second).ids)

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids, in which U+FFFD stands for what is no character. Raises InvalidParameter for ids that
        are not in the vocabulary."""
        for token in token_ids:
            if not 0 <= token < self.size:
                raise InvalidParameter(f"token id {token} is not in the vocabulary (0 to {self.size - 1})", "tokens")
        return self._table.text(token_ids, skip_special_tokens=skip_special_tokens)

    def vocabulary(self) -> dict[str, int]:
        """Raw spelling → id."""
        return dict(self._fast.get_vocab(with_added_tokens=True))

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to a text: all of them, joined, are the text's UTF-8."""
        return self._table[token_id]

    def token_text(self, token_id: int, *, begins: bool = False) -> str:
        """The same as text; a part of a character as OpenAI's API spells it: `bytes:\\xc3`. `begins`: as the first
        token of a text, which may lack a space."""
        return self._table.spelled(token_id, begins=begins)

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        **variables: Any,
    ) -> str:
        """A conversation as the model was trained to see it. Raises InvalidParameter when the template refuses it."""
        if not self.has_chat_template:
            raise InvalidParameter(
                "this model has no chat template; use completions, or start the server with --chat-template",
                "messages",
            )
        try:
            return str(
                self._backend.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    **variables,
                )
            )
        except Exception as error:  # templates are programs: whatever they raise is about these messages
            raise InvalidParameter(
                f"the chat template refuses these messages: {str(error)[:200]}", "messages"
            ) from error

    def spellings(self, word: str) -> Iterable[tuple[int, ...]]:
        """Token sequences that write a word: at the start of a text, and after a space."""
        found = {tuple(self.encode(prefix + word, add_special_tokens=False)) for prefix in ("", " ")}
        return sorted(sequence for sequence in found if sequence)

    def stream(
        self, *, skip_special_tokens: bool, spaces_between_special_tokens: bool, after: Sequence[int] = ()
    ) -> Detokenizer:
        """A fresh incremental detokenizer, of a text that goes on where `after` (a prompt, say) ends."""
        stream = Detokenizer(self._table, skip_special_tokens, spaces_between_special_tokens)
        stream.follow(after)
        return stream


def end_tokens(files: ModelFiles, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end a generation: those of generation_config.json, or else of the config, and the tokenizer's.
    What is not in the vocabulary is left out with a warning: it could not be drawn, nor kept from being drawn."""
    configured = files.generation_config.get("eos_token_id")
    if configured is None:
        configured = files.config.get("eos_token_id")
    named = [*(configured if isinstance(configured, list) else [configured]), tokenizer.end_token]
    found = [token for token in dict.fromkeys(named) if token is not None]
    size = files.config["vocab_size"]
    known = tuple(token for token in found if type(token) is int and 0 <= token < size)
    if len(known) < len(found):
        strange = ", ".join(str(token) for token in found if token not in known)
        log.warning("eos_token_id has %s, which the vocabulary of %d tokens lacks; left out", strange, size)
    return known


def _kept_conversion(path: Path) -> Path:
    status = path.stat()
    identity = json.dumps([str(path.resolve()), status.st_size, status.st_mtime_ns])
    return cache_folder() / "tokenizers" / hashlib.sha256(identity.encode()).hexdigest()[:24]


def _keep(backend: Any, folder: Path) -> None:
    """Writes the conversion whole or not at all; a full disk only costs the next start some seconds."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            backend.save_pretrained(scratch)
            os.rename(scratch, folder)
            os.mkdir(scratch)  # for TemporaryDirectory to remove
    except OSError as error:
        if not folder.exists():
            log.warning("the converted tokenizer could not be kept for the next start: %s", error)
