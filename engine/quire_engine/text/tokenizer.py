"""Texts to tokens and back, through transformers and tokenizers."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from quire_engine.errors import ContextTooLong, InvalidParameter, ModelError
from quire_engine.guidance.vocabulary import Vocabulary
from quire_engine.text.chat_template import ChatTemplate
from quire_engine.text.detokenizer import Detokenizer, TokenTable
from quire_engine.text.tokenizer_files import blame
from quire_engine.weights.json_file import read_object
from quire_engine.weights.resolve import ModelFiles

log = logging.getLogger(__name__)
LARGE_TEXT = 4096  # characters (or tokens) from which other threads run meanwhile
_PROCESSORS_TEMPLATE = "chat_template.json"  # of models of images and text, whose tokenizer has none then
_SHARE = 1 << 20  # characters
Item = TypeVar("Item")


class Tokenizer:
    """One model's tokenizer and chat template, for any number of threads."""

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
        self._template, self._no_template = _chat_template(backend, chat_template)
        self.tool_template = self._template  # of conversations with tools
        if chat_template is None and isinstance(backend.chat_template, dict) and "tool_use" in backend.chat_template:
            self.tool_template, why = _chat_template(backend, None, tools=[])
            self._no_template = self._no_template or why
        self._table = TokenTable(fast)
        self.size = len(backend)

    @staticmethod
    def load(files: ModelFiles, *, other: str | None = None, chat_template: str | None = None) -> "Tokenizer":
        """The model's own tokenizer, or `other` (a folder or hub id). Raises ModelError."""
        if files.vocabulary is not None and not other:
            from quire_engine.text.gguf.build import build

            return Tokenizer(build(files.vocabulary), chat_template)
        from transformers import AutoTokenizer

        source = Path(other).expanduser() if other else files.folder
        try:
            backend = AutoTokenizer.from_pretrained(
                str(source) if source.exists() else other,
                trust_remote_code=False,
                local_files_only=not other,
            )
        except Exception as error:  # transformers raises nearly anything here
            if not source.is_dir():
                raise ModelError(
                    f"tokenizer {other} cannot be loaded ({type(error).__name__}: {str(error)[:300]}); give another "
                    "one with --tokenizer"
                ) from error
            if not other:
                _ = files.config  # the same files: what is wrong with the config is not the tokenizer's fault
            raise blame(other or files.name, source, error) from error
        if not backend.chat_template and (path := source / _PROCESSORS_TEMPLATE).is_file():
            backend.chat_template = read_object(path).get("chat_template")
        return Tokenizer(backend, chat_template)

    @property
    def end_token(self) -> int | None:
        """The tokenizer's own end-of-sequence token."""
        return self._backend.eos_token_id

    @property
    def template_variables(self) -> frozenset[str]:
        """What callers may set in the chat template."""
        return self._template.variables if self._template is not None else frozenset()

    @property
    def added_tokens(self) -> Mapping[int, str]:
        """Token id → text, of the tokens that are found in a text before it is split into others."""
        return self._table.added

    @property
    def special_tokens(self) -> frozenset[int]:
        """The added tokens that are no text."""
        return self._table.special

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        return self.encode_all([text], add_special_tokens=add_special_tokens)[0]

    def encode_all(
        self, texts: Sequence[str], *, add_special_tokens: bool = True, most: int | None = None
    ) -> list[list[int]]:
        """Token ids of each text. Other threads run meanwhile, except for texts of a few words. Raises ContextTooLong
        for a text of more than `most` tokens."""
        if sum(map(len, texts)) < LARGE_TEXT:
            return [self._fast.encode(text, add_special_tokens=add_special_tokens).ids for text in texts]
        ids: list[list[int]] = []
        for some in _shares(texts, len):  # in batches, which give up the interpreter's lock, as `encode` does not
            found = self._fast.encode_batch_fast(some, add_special_tokens=add_special_tokens)
            longest = max(map(len, found))
            if most is not None and longest > most:
                raise ContextTooLong(f"a text has {longest} tokens; at most {most} are taken; shorten it", "prompt")
            ids += [one.ids for one in found]
        return ids

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
        """Token ids of two texts with whatever the model wants between them, for each pair."""
        shares = _shares(pairs, lambda pair: len(pair[0]) + len(pair[1]))
        return [one.ids for some in shares for one in self._fast.encode_batch_fast(some)]

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids, in which U+FFFD stands for what is no character. Raises InvalidParameter for ids that
        are not in the vocabulary."""
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self.size:
            wrong = next(token for token in token_ids if not 0 <= token < self.size)
            raise InvalidParameter(f"token id {wrong} is not in the vocabulary (0 to {self.size - 1})", "tokens")
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
        variables: Mapping[str, Any] | None = None,
        tools: list[dict[str, Any]] | None = None,
    ) -> str:
        """A conversation as the model was trained to see it. `tools`: as OpenAI's API has them. Raises
        InvalidParameter when the template refuses it, and for variables that it does not read."""
        template = self.tool_template if tools else self._template
        if template is None:
            raise InvalidParameter(f"{self._no_template}; use completions, or start the server with --chat-template")
        return template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=variables or {},
            tools=tools,
        )

    def describe_tools(self) -> None:
        """Has tools described in words, by the template of conversations without any: one for tools wants them."""
        self.tool_template = self._template or self.tool_template
        if self.tool_template is not None:
            self.tool_template.describe_tools()

    def for_grammars(self, files: ModelFiles, size: int) -> Vocabulary:
        """As grammars see it. `size`: of the model's logits."""
        return Vocabulary(
            tokens=[self._table[token] for token in range(min(self.size, size))],
            delimiters=frozenset(self.delimiters.values()),
            ends=end_tokens(files, self),
            size=size,
            encode=lambda text: self.encode(text, add_special_tokens=False),
        )

    @cached_property
    def delimiters(self) -> dict[str, int]:
        """Tokens that stand for something instead of being text, by their spelling. Those that were added to a
        vocabulary, but for what is space alone: some vocabularies have added that for the sake of code."""
        return {spelling: token for token, spelling in self._table.added.items() if spelling.strip()}

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
    What is not in the vocabulary is left out with a warning: it could not be drawn, nor kept from being drawn.

    Raises ModelError for what is no token id.
    """
    source, configured = "generation_config.json", files.generation_config.get("eos_token_id")
    if configured is None:
        source, configured = "config.json", files.config.get("eos_token_id")
    named = configured if isinstance(configured, list) else [] if configured is None else [configured]
    if strange := [token for token in named if type(token) is not int]:
        raise ModelError(
            f"{source} has eos_token_id {configured!r:.80}, where {strange[0]!r:.40} is no token id; write a whole "
            "number or a list of them"
        )
    size = files.config["vocab_size"]
    ends = [*named, *([] if tokenizer.end_token is None else [tokenizer.end_token])]
    known = tuple(dict.fromkeys(token for token in ends if 0 <= token < size))
    if left := [token for token in ends if token not in known]:
        log.warning(
            "eos_token_id of %s or the tokenizer has %s, which the vocabulary of %d tokens lacks; left out",
            source,
            ", ".join(map(str, left)),
            size,
        )
    return known


def _shares(values: Sequence[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """What is encoded at once: an encoding takes many times the memory of its text."""
    share: list[Item] = []
    total = 0
    for value in values:
        share.append(value)
        total += size(value)
        if total >= _SHARE:
            yield share
            share, total = [], 0
    if share:
        yield share


def _chat_template(
    backend: Any, given: str | None, *, tools: list[dict[str, Any]] | None = None
) -> tuple[ChatTemplate | None, str]:
    """The one given, or the model's own (for tools, where it has several); else why there is none. Raises ModelError
    for a given one that is broken."""
    if given is not None:
        return ChatTemplate(given, backend.special_tokens_map), ""
    if not backend.chat_template:
        return None, "this model has no chat template"
    try:
        return ChatTemplate(backend.get_chat_template(tools=tools), backend.special_tokens_map), ""
    except (ModelError, ValueError) as error:
        log.warning("conversations cannot be served: %s", error)
        return None, "this model's chat template cannot be used"
