"""A request: its token log, where it stands, and its one ending."""

from dataclasses import dataclass, field
from enum import Enum

from quire_engine.errors import ContextTooLong
from quire_engine.sampling.params import EngineSampling


class State(Enum):
    """waiting → running → finished; running → waiting when preempted."""

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
    arrival: float = 0.0
    deadline: float = 0.0  # seconds since the epoch; 0: none
    cache_salt: bytes = b""
    state: State = State.WAITING
    num_computed: int = 0  # tokens whose keys and values are in the cache, or on their way in a step in flight
    pending: int = 0  # tokens that steps in flight draw; they are not in the log yet
    pages: list[int] = field(default_factory=list)  # the block table
    row: int = -1  # its place in the workers' static tables while it runs
    block_hashes: list[bytes] = field(default_factory=list)  # of its full blocks, chained
    num_registered: int = 0  # of its blocks, those the prefix index knows
    state_page: int = -1  # of recurrent states, as they are after `num_computed` tokens
    left_state: bytes = b""  # the hash under which it left its state last while decoding
    checkpoint: int = 0  # its prompt's computation pauses here: others that branch off want the state
    num_scored: int = 0  # of the prompt's tokens, those whose log-probabilities were reported
    num_cached: int = -1  # tokens found in the prefix cache at the first admission
    finish_reason: str | None = None  # stop, length, abort, error
    stop_token_id: int | None = None
    error: Exception | None = None
    stop_ids: frozenset[int] = frozenset()
    end_length: int = 0  # len(tokens) at which it ends by length
    min_length: int = 0  # len(tokens) before which no stop token counts

    def __post_init__(self) -> None:
        self.stop_ids = frozenset(self.params.stop_token_ids)
        self.end_length = self.num_prompt + self.params.max_tokens
        self.min_length = self.num_prompt + self.params.min_tokens

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.num_prompt

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
