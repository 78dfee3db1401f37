"""What a caller asks for, texts included; checked here, once, for every way in (HTTP, gRPC, offline)."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

from quire_engine.errors import InvalidParameter
from quire_engine.guidance.structure import StructuredOutputs
from quire_engine.request import MAX_LOGPROBS, EngineSampling, TokenSet
from quire_engine.text.formats.chat import ALL_CONTENT, Answer
from quire_engine.text.tokenizer import Tokenizer

MAX_INT = 2**31 - 1
MAX_CHOICES = 128
MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1000
MAX_STOP_TOKENS = 256
MAX_BIASES = 1024
MAX_BAD_WORDS = 256
MAX_BAD_WORD_LENGTH = 256
_LEAST_TOP_P = 1e-6  # what 0 means: the likeliest token is always in


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Names and defaults as in the field. Raises InvalidParameter for any value out of bounds."""

    n: int = 1
    max_tokens: int | None = 16  # None: what is left of the context; 0, with prompt_logprobs: the prompt is scored
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    structured_outputs: StructuredOutputs | None = None
    thinking_token_budget: int | None = None  # of a conversation's answer: its reasoning is ended after so many

    def __post_init__(self) -> None:
        self._check_kinds()
        _between("n", self.n, 1, MAX_CHOICES)
        if self.max_tokens == 0 and self.prompt_logprobs is None:
            raise InvalidParameter(
                "max_tokens is 0, so nothing would be generated; it must be at least 1, but for completions with echo, "
                "and where prompt_logprobs asks for the prompt's scores",
                "max_tokens",
            )
        if self.max_tokens is not None:
            _between("max_tokens", self.max_tokens, 0, MAX_INT)
        _between("min_tokens", self.min_tokens, 0, MAX_INT)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidParameter(
                f"min_tokens is {self.min_tokens}, more than max_tokens ({self.max_tokens})", "min_tokens"
            )
        _between("temperature", self.temperature, 0, 1000)
        _between("top_p", self.top_p, 0, 1)
        _between("top_k", self.top_k, -1, MAX_INT)
        _between("min_p", self.min_p, 0, 1)
        _between("presence_penalty", self.presence_penalty, -2, 2)
        _between("frequency_penalty", self.frequency_penalty, -2, 2)
        _between("repetition_penalty", self.repetition_penalty, 0.01, 100)
        if self.seed is not None:
            _between("seed", self.seed, -(2**63), 2**63 - 1)
        if self.thinking_token_budget is not None:
            _between("thinking_token_budget", self.thinking_token_budget, 0, MAX_INT)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _between(name, getattr(self, name), 0, MAX_LOGPROBS)
        _texts("stop", self.stop_strings, MAX_STOP_STRINGS, MAX_STOP_LENGTH)
        _texts("bad_words", self.bad_words or [], MAX_BAD_WORDS, MAX_BAD_WORD_LENGTH)
        _count("stop_token_ids", self.stop_token_ids or [], MAX_STOP_TOKENS)
        _count("logit_bias", self.logit_bias or {}, MAX_BIASES)
        for value in (self.logit_bias or {}).values():
            _between("logit_bias", value, -100, 100)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InvalidParameter("allowed_token_ids is empty: nothing could be drawn", "allowed_token_ids")
        if self.structured_outputs is not None:
            object.__setattr__(self, "structured_outputs", StructuredOutputs.of(self.structured_outputs))

    def _check_kinds(self) -> None:
        """A value of another kind would end the step it is in, and all that is in it."""
        for names, right, kind in _KINDS:
            for name in names:
                value = getattr(self, name)
                if not right(value) and not (value is None and name in _MAY_BE_NONE):
                    raise InvalidParameter(f"{name} is {value!r:.80}; it must be {kind}", name)

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)

    def check(self, vocab_size: int, room: int) -> None:
        """Raises InvalidParameter for token ids that the model's logits do not have, and for more min_tokens than the
        prompt leaves room for."""
        self._check_ids(vocab_size)
        self.check_room(room)

    def _check_ids(self, vocab_size: int) -> None:
        for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
            tokens = getattr(self, name)
            if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
                wrong = next(token for token in tokens if not 0 <= token < vocab_size)
                raise InvalidParameter(f"{name} holds {wrong}; token ids go from 0 to {vocab_size - 1}", name)

    def check_room(self, room: int) -> None:
        """Raises InvalidParameter for more min_tokens than this."""
        if self.min_tokens > room:
            raise InvalidParameter(
                f"min_tokens is {_short(self.min_tokens)}; the prompt leaves {room} tokens of the context; lower "
                "min_tokens or shorten the prompt",
                "min_tokens",
            )

    def in_tokens(
        self,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        end_tokens: tuple[int, ...],
        answer: Answer | None = None,
    ) -> "TokenSampling":
        """The part the engine sees, in tokens. Takes up to 0.1 s where there are many long `bad_words`, and up to a
        second where there is a grammar. `answer`: how answers to a conversation are guided and read.

        Raises InvalidParameter for token ids that the model's logits do not have, and for a grammar that cannot be
        compiled.
        """
        self._check_ids(vocab_size)
        guidance = answer.guidance if answer is not None else None
        if self.structured_outputs is not None:
            self.structured_outputs.check()
            guidance = guidance or self.structured_outputs.spec(tokenizer.delimiters)
        if answer is None and self.thinking_token_budget is not None:
            raise InvalidParameter(
                "thinking_token_budget is for conversations, whose answers may have reasoning; leave it out",
                "thinking_token_budget",
            )
        if guidance is not None and self.ignore_eos:
            raise InvalidParameter(
                "ignore_eos does not let an output end where its tools, structure or thinking budget want it to; leave "
                "it out",
                "ignore_eos",
            )
        stops = tuple(self.stop_token_ids or ())
        if not self.ignore_eos:
            stops += end_tokens
        bad_words = tuple(word for text in self.bad_words or () for word in tokenizer.spellings(text))
        if self.allowed_token_ids is not None:
            never = {word[0] for word in bad_words if len(word) == 1} | set(stops if self.min_tokens else ())
            if never.issuperset(self.allowed_token_ids):
                raise InvalidParameter(
                    "bad_words and min_tokens rule out every one of allowed_token_ids: nothing could be drawn",
                    "allowed_token_ids",
                )
        shared = EngineSampling(
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=max(self.top_p, _LEAST_TOP_P),
            top_k=self.top_k if 0 < self.top_k < vocab_size else 0,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            stop_token_ids=stops,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
            logit_bias=self.logit_bias or None,
            allowed_token_ids=TokenSet.of(self.allowed_token_ids or ()),
            bad_words=bad_words,
            guidance=guidance.to_json() if guidance is not None else "",
        )
        return TokenSampling(self, shared, answer or ALL_CONTENT)


@dataclass(frozen=True, slots=True)
class TokenSampling:
    """Parameters of sampling as one model takes them, made once for all the prompts they go with. `shared`: what is the
    same for every choice of each, so without its `max_tokens` and `seed`. `answer`: how outputs are read."""

    params: SamplingParams
    shared: EngineSampling
    answer: Answer

    def choices(self, *, room: int, seed: int) -> list[EngineSampling]:
        """For each of the `n` choices of a prompt. `room`: tokens left of the context; choice i draws with `seed` + i.

        Raises InvalidParameter for more min_tokens than there is room for.
        """
        params = self.params
        params.check_room(room)
        most = params.max_tokens if params.max_tokens is not None else room
        first = replace(self.shared, max_tokens=most, seed=seed % 2**64)
        others = (  # the prompt is the same for all
            replace(first, seed=(seed + choice) % 2**64, prompt_logprobs=None) for choice in range(1, params.n)
        )
        return [first, *others]


def _is(*kinds: type) -> Callable[[Any], bool]:
    """Whether something is of one of these, where a bool is no number."""
    return lambda value: isinstance(value, kinds) and not isinstance(value, bool)


def _are(*kinds: type) -> Callable[[Any], bool]:
    """Whether something is a sequence of these. It may be long, so each kind in it is looked at once."""
    return lambda values: isinstance(values, Sequence) and not isinstance(values, str | bytes) and _alike(values, kinds)


def _alike(values: Iterable[Any], kinds: tuple[type, ...]) -> bool:
    return all(issubclass(kind, kinds) and kind is not bool for kind in set(map(type, values)))


def _are_biases(value: Any) -> bool:
    return isinstance(value, Mapping) and _alike(value, (Integral,)) and _alike(value.values(), (Real,))


_MAY_BE_NONE = {field.name for field in fields(SamplingParams) if field.default is None} | {"max_tokens"}
_KINDS: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (
        ("n", "max_tokens", "min_tokens", "top_k", "seed", "logprobs", "prompt_logprobs", "thinking_token_budget"),
        _is(Integral),
        "an integer",
    ),
    (
        ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
        _is(Real),
        "a number",
    ),
    (("stop_token_ids", "allowed_token_ids"), _are(Integral), "a list of token ids"),
    (("stop",), lambda value: isinstance(value, str) or _are(str)(value), "a text or a list of texts"),
    (("bad_words",), _are(str), "a list of texts"),
    (("logit_bias",), _are_biases, "numbers by token id"),
)


def _between(name: str, value: float, least: float, most: float | None) -> None:
    finite = isinstance(value, int) or math.isfinite(value)
    if not finite or value < least or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"between {least} and {most}"
        raise InvalidParameter(f"{name} is {_short(value)}; it must be {bounds}", name)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 40 else f"{text[:36]}…"


def _count(name: str, values: Any, most: int) -> None:
    if len(values) > most:
        raise InvalidParameter(f"{name} has {len(values)} entries; at most {most} are allowed", name)


def _texts(name: str, texts: list[str], most: int, longest: int) -> None:
    _count(name, texts, most)
    for text in texts:
        if not text:
            raise InvalidParameter(f"{name} holds an empty text", name)
        if len(text) > longest:
            raise InvalidParameter(
                f"{name} holds a text of {len(text)} characters; at most {longest} are allowed", name
            )
