"""Texts to tokens and back, for one model. What is large is worked on in threads, so that the event loop goes on."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from quire_engine.errors import ContextTooLong
from quire_engine.text.formats.chat import Answer
from quire_engine.text.images import check_conversation, expand, first_lost, parts_of
from quire_engine.text.params import SamplingParams, TokenSampling
from quire_engine.text.tokenizer import LARGE_TEXT, Tokenizer

MAX_LISTED = 1 << 20  # tokens of a text, where no context bounds them
_CHARACTERS_PER_TOKEN = 6  # more than in nearly any text
_CUT_SLACK = 16  # tokens that may differ because a text was cut
_FEW = 32  # messages
_BYTES_PER_CHARACTER = 6  # \\uXXXX in JSON
_ROOM = 4 << 20  # bytes that any body may have
Result = TypeVar("Result")


class Texts:
    """`context`, where it is asked for, is how many tokens the model's context holds."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        spellings = sorted(tokenizer.vocabulary().items(), key=lambda item: -len(item[0]))[:16]
        self._longest_token = max(len(tokenizer.token_text(token)) for _, token in spellings)

    def bytes_of(self, context: int, prompts: int) -> int:
        """The most that a body with so many prompts can be long, and not be too long for the context."""
        return _ROOM + prompts * context * self._longest_token * _BYTES_PER_CHARACTER

    async def prompts(
        self, texts: Sequence[str], *, context: int, add_special_tokens: bool, parameter: str
    ) -> list[list[int]]:
        """Token ids of each text. One far beyond the context is refused (ContextTooLong) for its beginning alone."""

        def work() -> list[list[int]]:
            for text in texts:
                self._check_length(text, context, parameter)
            most = max(MAX_LISTED, context)
            return self._tokenizer.encode_all(texts, add_special_tokens=add_special_tokens, most=most)

        return await _off_loop(work, large=sum(map(len, texts)) >= LARGE_TEXT)

    def _check_length(self, text: str, context: int, parameter: str) -> None:
        """Of a long text, piece by piece, until it is certain that it does not fit."""
        piece = max(context * _CHARACTERS_PER_TOKEN, LARGE_TEXT)
        if len(text) <= piece:
            return
        tokens, slack = 0, 0
        if len(text) <= context * self._longest_token:
            for start in range(0, len(text), piece):
                slack += _CUT_SLACK
                some = self._tokenizer.encode_all([text[start : start + piece]], add_special_tokens=False)
                tokens += len(some[0])
                if tokens > context + slack:
                    break
            else:
                return
        raise ContextTooLong(
            f"the {parameter} has {len(text)} characters, and more tokens than the context of {context} holds; "
            "shorten it",
            parameter,
        )

    async def pairs(self, pairs: Sequence[tuple[str, str]], *, context: int) -> list[list[int]]:
        """Token ids of two texts each, as a classifier wants them. Raises ContextTooLong."""

        def work() -> list[list[int]]:
            for text in {text for pair in pairs for text in pair}:
                self._check_length(text, context, "input")
            return self._tokenizer.encode_pairs(pairs)

        return await asyncio.to_thread(work)

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of any text of at most MAX_LISTED tokens."""

        def work() -> list[int]:
            return self._tokenizer.encode_all([text], add_special_tokens=add_special_tokens, most=MAX_LISTED)[0]

        return await _off_loop(work, large=len(text) >= LARGE_TEXT)

    async def decode(self, token_ids: list[int]) -> str:
        """Their text, special tokens included. Raises InvalidParameter."""
        return await _off_loop(
            lambda: self._tokenizer.decode(token_ids, skip_special_tokens=False), large=len(token_ids) >= LARGE_TEXT
        )

    async def spellings(self, token_ids: list[int]) -> list[str]:
        """Each token as text."""
        spelled = self._tokenizer.token_text
        return await _off_loop(
            lambda: [spelled(token) for token in token_ids], large=len(token_ids) >= LARGE_TEXT // 16
        )

    async def sampling(
        self, params: SamplingParams, *, vocab_size: int, end_tokens: tuple[int, ...], answer: Answer | None
    ) -> TokenSampling:
        """In tokens. Raises InvalidParameter."""
        words, ids = params.bad_words or (), params.allowed_token_ids or ()
        return await _off_loop(
            lambda: params.in_tokens(self._tokenizer, vocab_size=vocab_size, end_tokens=end_tokens, answer=answer),
            large=params.structured_outputs is not None or sum(map(len, words)) + len(ids) >= LARGE_TEXT // 16,
        )

    async def conversation(
        self,
        messages: list[dict[str, Any]],
        *,
        context: int,
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, Any],
        tools: list[dict[str, Any]] | None,
        placeholder: str = "",
    ) -> list[int]:
        """A conversation's prompt. `placeholder`: what the template writes for each of its images; "": there are none.
        Raises InvalidParameter for what the chat template does not take."""

        def work() -> str:
            rendered = self._tokenizer.render(
                messages,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                variables=variables,
                tools=tools,
            )
            if not placeholder:
                return rendered
            check_conversation(messages, placeholder)
            return expand(
                rendered, [part["image"] for _, part in parts_of(messages)], placeholder, first_lost(messages)
            )

        rendered = await _off_loop(
            work,
            large=bool(tools) or not _is_small(messages, variables),
        )
        found = await self.prompts([rendered], context=context, add_special_tokens=False, parameter="messages")
        return found[0]


async def _off_loop(work: Callable[[], Result], *, large: bool) -> Result:
    return await asyncio.to_thread(work) if large else work()


def _is_small(messages: list[dict[str, Any]], variables: Mapping[str, Any]) -> bool:
    """A few short texts, and nothing that would have to be looked into."""
    if len(messages) > _FEW:
        return False
    values = [value for message in messages for value in message.values()]
    texts = [value for value in values if isinstance(value, str)]
    plain = len(texts) == len(values) and all(isinstance(value, (bool, int)) for value in variables.values())
    return plain and sum(map(len, texts)) < LARGE_TEXT
