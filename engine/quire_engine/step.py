"""What goes from the scheduler to the workers each step, and what comes back."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from quire_engine.request import EngineSampling, Request
from quire_engine.waiting import WaitsFor

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]
Failure = tuple[str, bool]  # why, and whether it is ours in any case: else it is what the request asks for, if anything
REJECTED = -2  # in place of a token: a draft before it was none that the sampler drew


@dataclass(slots=True)
class NewRow:
    """A request takes a row: what the sampler must know of it."""

    row: int
    params: EngineSampling
    num_prompt: int
    tokens: Ints  # the log so far; empty where neither changed logits nor prompt log-probabilities need it


@dataclass(frozen=True, slots=True)
class Places:
    """The S places of a step at which a token is drawn. Those of a row follow one another: the first stands behind what
    is known of it, each further one behind one more draft, as if that had been drawn."""

    rows: Ints  # [S]
    positions: Ints  # [S] of the token to be drawn: so many tokens stand before it
    drafts: Ints  # [S] the draft right before it; -1: none, the row's first place

    @property
    def drafted(self) -> bool:
        """Whether there are drafts at all."""
        return bool((self.drafts >= 0).any())


@dataclass(slots=True)
class StepPlan:
    """One step. R requests compute T tokens; S of them draw a token at the end."""

    rows: Ints  # [R]
    starts: Ints  # [R] position of the first token to compute
    counts: Ints  # [R] tokens to compute
    token_ids: Ints  # [T]; -1: the token drawn last for the row, which only the device knows yet
    draws: NDArray[np.bool_]  # [R] whether the last token's logits are sampled
    page_rows: Ints  # [N] block table entries to set: row,
    page_indexes: Ints  # [N] place in the row,
    page_ids: Ints  # [N] page
    state_reads: Ints  # [R] the page of recurrent state to start from, -1: zeros; empty where the model has none
    state_writes: Ints  # [R] the page to leave it in
    new_rows: list[NewRow] = field(default_factory=list)

    @staticmethod
    def empty() -> "StepPlan":
        """No request at all."""
        none = np.zeros(0, np.int32)
        return StepPlan(none, none, none, none, np.zeros(0, np.bool_), none, none, none, none, none)


@dataclass(slots=True)
class PlanDraft:
    """A plan in the making: see StepPlan for what the lists hold."""

    budget: int  # tokens that it may still compute
    now: float
    requests: list[Request] = field(default_factory=list)  # of the rows
    rows: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    draws: list[bool] = field(default_factory=list)
    pages: list[tuple[int, int, int]] = field(default_factory=list)  # row, place, page
    states: list[tuple[int, int]] = field(default_factory=list)  # read, written
    new_rows: list[NewRow] = field(default_factory=list)
    held: dict[Request, WaitsFor] = field(default_factory=dict)  # what runs and is left out, and the head of the queue

    def plan(self) -> StepPlan:
        """Its arrays."""
        pages, states = np.array(self.pages, np.int32).reshape(-1, 3), np.array(self.states, np.int32).reshape(-1, 2)
        return StepPlan(
            rows=np.array(self.rows, np.int32),
            starts=np.array(self.starts, np.int32),
            counts=np.array(self.counts, np.int32),
            token_ids=np.array(self.token_ids, np.int32),
            draws=np.array(self.draws, np.bool_),
            page_rows=pages[:, 0],
            page_indexes=pages[:, 1],
            page_ids=pages[:, 2],
            state_reads=states[:, 0],
            state_writes=states[:, 1],
            new_rows=self.new_rows,
        )


@dataclass(slots=True)
class TokenLogprobs:
    """Log-probabilities of P positions of one request, as the model gave them (before penalties and temperature)."""

    chosen: Ints  # [P] token ids
    logprobs: NDArray[np.float32]  # [P]
    ranks: Ints  # [P] 1: the most likely
    top_ids: Ints  # [P, width]
    top_logprobs: NDArray[np.float32]  # [P, width]

    def part(self, start: int, end: int | None = None) -> "TokenLogprobs":
        """The positions from `start` to before `end`."""
        return TokenLogprobs(*(getattr(self, name)[start:end] for name in TokenLogprobs.__slots__))

    def after(self, count: int) -> "TokenLogprobs":
        """Without the first `count` positions."""
        return self.part(count)


@dataclass(slots=True)
class StepResult:
    """What rank 0 returns."""

    tokens: Ints  # [S] in the order of the plan's drawing rows
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)  # row → of the drawn token
    prompt_logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)  # row → of this step's prompt tokens
    failed: dict[int, Failure] = field(default_factory=dict)  # by the row: why no token could be drawn
    vectors: Floats | None = None  # [S, width] in place of tokens (which are 0), of models that pool
