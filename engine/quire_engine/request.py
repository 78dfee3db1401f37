"""A request: what it asks for, its token log, where it stands, and its one ending."""

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from quire_engine.errors import ContextTooLong, InvalidParameter

MAX_LOGPROBS = 20  # alternatives beside a token
LEAST_WEIGHT, MOST_WEIGHT = 1e-6, 1e6  # of a tenant


@dataclass(frozen=True, slots=True)
class TokenSet:
    """Token ids as a bit each: an eighth of a byte of the vocabulary, however many they are. False where empty."""

    bits: bytes = b""  # the lowest id first

    @staticmethod
    def of(ids: Collection[int]) -> "TokenSet":
        """Ids at least 0, each any number of times."""
        if not ids:
            return TokenSet()
        held = np.zeros(max(ids) + 1, np.bool_)
        held[np.fromiter(ids, np.int64, len(ids))] = True
        return TokenSet(np.packbits(held, bitorder="little").tobytes())

    def __bool__(self) -> bool:
        return bool(self.bits)

    def ids(self) -> NDArray[np.int64]:
        """Ascending."""
        return np.flatnonzero(np.unpackbits(np.frombuffer(self.bits, np.uint8), bitorder="little"))


_BOUNDS = (
    ("temperature", 0, math.inf),
    ("top_p", 0, 1),
    ("min_p", 0, 1),
    ("presence_penalty", -2, 2),
    ("frequency_penalty", -2, 2),
    ("repetition_penalty", 0.009, 101),  # a float32 is near 0.01 and 100
    ("logprobs", 0, MAX_LOGPROBS),
    ("prompt_logprobs", 0, MAX_LOGPROBS),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSampling:
    """What it asks of the sampler, in tokens: texts (stop strings, words) are the gateway's and never come here.

    Defaults as in the field. What clients are told of bounds is in text/params.py; `check` holds what a step relies on.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 and -1: all
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0  # with the absolute position, the whole state of the random numbers
    stop_token_ids: tuple[int, ...] = ()  # the model's end tokens among them, unless they are ignored
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: TokenSet = TokenSet()  # empty: all
    bad_words: tuple[tuple[int, ...], ...] = ()
    guidance: str = ""  # what the output has to look like: a GuidanceSpec as JSON; "": anything

    def check(self, vocab_size: int) -> None:
        """Raises InvalidParameter for what would harm the step it is in, and so its neighbours."""
        for name, least, most in _BOUNDS:
            value = getattr(self, name)
            if value is not None and not least <= value <= most:  # NaN is within nothing
                raise InvalidParameter(f"{name} is {value}; it must be between {least} and {most}", name)
        biases = self.logit_bias or {}
        for name, ids in (("logit_bias", biases), ("allowed_token_ids", self.allowed_token_ids.ids()[-1:])):
            if any(not 0 <= token < vocab_size for token in ids):
                raise InvalidParameter(f"{name} holds an id outside the vocabulary of {vocab_size} tokens", name)
        if not all(math.isfinite(bias) for bias in biases.values()):
            raise InvalidParameter("logit_bias holds a value that is not finite", "logit_bias")
        if not all(self.bad_words):
            raise InvalidParameter("bad_words holds a word of no tokens", "bad_words")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature < 1e-5

    @property
    def penalized(self) -> bool:
        """Whether the tokens so far change the logits."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)

    @property
    def restricted(self) -> bool:
        """Whether there are tokens that may not be drawn, so that none may be left."""
        return bool(self.guidance) or self._bans

    @property
    def edits_logits(self) -> bool:
        """Whether the logits of this request need anything before temperature."""
        return bool(self.penalized or self.logit_bias or self._bans)

    @property
    def _bans(self) -> bool:
        return bool(self.allowed_token_ids or self.bad_words or (self.min_tokens and self.stop_token_ids))

    @property
    def needs_log(self) -> bool:
        """Whether the rank that draws has to know the tokens so far."""
        return bool(self.edits_logits or self.guidance or self.prompt_logprobs is not None)


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """Where an image stands in a prompt: from the first to the last token that its embeddings replace. Where these lie
    in rows and columns (M-RoPE), every token of the span is one of them."""

    key: bytes  # of what it shows: equal for equal files alone
    start: int
    length: int
    rows: int = 0  # of its embeddings; 0: positions count on as in a text
    columns: int = 0

    @property
    def end(self) -> int:
        """The first token behind it."""
        return self.start + self.length


class State(Enum):
    """(preparing →) waiting (→ fetching → waiting) → running → finished; running → waiting when preempted."""

    PREPARING = "preparing"  # its grammar is being compiled
    FETCHING = "fetching"  # an image of its prompt is on its way
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Request:
    """`tokens` is the log: the prompt, then what was generated. A resumed request comes with output already in it."""

    id: int
    tokens: list[int]
    num_prompt: int
    params: EngineSampling
    priority: int = 0
    arrival: float = 0.0  # in time.monotonic() seconds
    deadline: float = 0.0  # of the same clock; 0: none
    cache_salt: bytes = b""
    images: tuple[ImageSpan, ...] = ()  # of the prompt, in order
    resumed: bool = False  # an engine had accepted it: no queue is too full for it
    tenant: str = ""  # whose it is
    weight: float = 1.0  # the tenant's, against others of its class
    waiting_since: float = 0.0  # of the same clock: when it came, was preempted, or was left out of a plan; 0: arrival
    state: State = State.WAITING
    num_computed: int = 0  # tokens whose keys and values are in the cache, or on their way in a step in flight
    pending: int = 0  # tokens that steps in flight draw; they are not in the log yet
    pages: list[int] = field(default_factory=list)  # the block table
    row: int = -1  # its place in the workers' static tables while it runs
    block_hashes: list[bytes] = field(default_factory=list)  # of its full blocks, chained
    num_registered: int = 0  # of its blocks, those the prefix index knows
    again: int = 0  # tokens that are computed again with its next one: the state before them is the last that it has
    begun_at: int = 0  # tokens of the log when it took its row
    num_read: int = 0  # tokens of the log that a draft model has read, one that goes by tokens alone
    state_page: int = -1  # of recurrent states, as they are after `num_computed` tokens
    draft_page: int = -1  # of the same after the drafts that are in flight
    left_state: bytes = b""  # the hash under which it left its state last while decoding
    checkpoint: int = 0  # its prompt's computation pauses here: others that branch off want the state
    num_scored: int = 0  # of the prompt's tokens, those whose log-probabilities were reported
    num_cached: int = -1  # tokens found in the prefix cache at the first admission
    num_drafts: int = 0  # tokens that were guessed and computed,
    num_accepted: int = 0  # and of these, those that were drawn
    finish_reason: str | None = None  # stop, length, abort, error
    stop_token_id: int | None = None
    error: Exception | None = None
    stop_ids: frozenset[int] = frozenset()
    end_length: int = 0  # len(tokens) at which it ends by length
    min_length: int = 0  # len(tokens) before which no stop token counts
    images_end: int = 0  # the tokens before which there are images
    image_places: list[NDArray[np.int32]] = field(default_factory=list)  # of each image the tokens it is embedded in
    num_given: int = 0  # len(tokens) when it came
    charged_prompt: int = 0  # of these, tokens that its tenant was charged, or that were found in the cache
    charged_length: int = 0  # len(tokens) up to which its tenant was charged what was drawn

    def __post_init__(self) -> None:
        self.stop_ids = frozenset(self.params.stop_token_ids)
        self.end_length = self.num_prompt + self.params.max_tokens
        self.min_length = self.num_prompt + self.params.min_tokens
        self.images_end = self.images[-1].end if self.images else 0
        self.waiting_since = self.waiting_since or self.arrival
        self.num_given = self.charged_length = len(self.tokens)

    def check(self, vocab_size: int) -> None:
        """Raises InvalidParameter for a log or for parameters that would harm the step it is in."""
        if not 0 < self.num_prompt <= len(self.tokens):
            raise InvalidParameter("the prompt has no tokens", "prompt")
        if min(self.tokens) < 0 or max(self.tokens) >= vocab_size:
            raise InvalidParameter(f"a token id is outside 0 to {vocab_size - 1}", "prompt")
        if not LEAST_WEIGHT <= self.weight <= MOST_WEIGHT:  # NaN is within nothing
            raise InvalidParameter(
                f"weight is {self.weight}; it must be between {LEAST_WEIGHT:g} and {MOST_WEIGHT:g}", "weight"
            )
        before = 0
        for image in self.images:
            if image.start < before or image.length < 1 or image.end > self.num_prompt:
                raise InvalidParameter("images do not lie one after another within the prompt", "images")
            if image.rows and image.rows * image.columns != image.length:
                raise InvalidParameter("an image's rows and columns are not its tokens", "images")
            before = image.end
        self.params.check(vocab_size)

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        """Tokens that are known, and in no step yet."""
        return max(0, len(self.tokens) - self.num_computed)  # below 0 where tokens in flight are not known yet

    @property
    def at_last_token(self) -> bool:
        """Whether the token in flight is its last."""
        return self.pending > 0 and len(self.tokens) + self.pending >= self.end_length

    @property
    def draws_next(self) -> bool:
        """Whether one more token is drawn as soon as what it lacks is computed: it lacks no tokens of its prompt."""
        lacking = len(self.tokens) + self.pending - self.num_computed
        return lacking == 1 + self.again and self.num_computed >= self.images_end

    @property
    def has_run(self) -> bool:
        """Whether it ever had a row here: where it waits, it was preempted."""
        return self.num_cached >= 0

    def finish(self, reason: str, *, stop_token_id: int | None = None, error: Exception | None = None) -> None:
        """Its only ending; a second one is a bug."""
        assert self.state is not State.FINISHED, f"request {self.id} ends twice"
        self.state = State.FINISHED
        self.finish_reason = reason
        self.stop_token_id = stop_token_id
        self.error = error


def check_length(num_prompt: int, max_tokens: int | None, context: int) -> None:
    """Raises ContextTooLong for a prompt that, with what is to be generated, can never fit the context (in tokens)."""
    room = context - num_prompt
    if room < 1:
        raise ContextTooLong(
            f"the prompt has {num_prompt} tokens; the context is {context}, and one must be left to generate; "
            "shorten the prompt",
            "prompt",
        )
    if max_tokens is not None and max_tokens > room:
        raise ContextTooLong(
            f"max_tokens is {str(max_tokens)[:20]}; the prompt's {num_prompt} tokens leave {room} of the context of "
            f"{context}; lower max_tokens or shorten the prompt",
            "max_tokens",
        )
