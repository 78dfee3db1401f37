"""What goes from the scheduler to the workers each step, and what comes back."""

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from quire_engine.config import SchedulerLimits
from quire_engine.fairness import OUTPUT_PRICE
from quire_engine.request import EngineSampling, ImageSpan, Request, State
from quire_engine.waiting import WaitsFor

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]
Failure = tuple[str, bool]  # why, and whether it is ours in any case: else it is what the request asks for, if anything
REJECTED = -2  # in place of a token: a draft before it was none that the sampler drew
TO_GUESS = -2  # in place of a draft: the workers' draft model guesses it when the step begins


@dataclass(slots=True)
class NewRow:
    """A request takes a row: what the sampler must know of it."""

    row: int
    params: EngineSampling
    num_prompt: int
    tokens: Ints  # the log so far; empty where neither changed logits nor prompt log-probabilities need it
    images: tuple[ImageSpan, ...] = ()


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

    @staticmethod
    def alone(rows: Ints, positions: Ints) -> "Places":
        """One of each row, without drafts."""
        return Places(rows, positions, np.full(len(rows), -1, np.int32))

    def by_row(self) -> dict[int, range]:
        """Where each row has its places."""
        if not self.drafted:
            return {row: range(place, place + 1) for place, row in enumerate(self.rows.tolist())}
        firsts = np.flatnonzero(self.drafts < 0)
        ends = [*firsts[1:].tolist(), len(self.rows)]
        return {row: range(*span) for row, *span in zip(self.rows[firsts].tolist(), firsts.tolist(), ends, strict=True)}

    def firsts(self) -> NDArray[np.int64]:
        """Of each place [S], where its row has its first."""
        return np.maximum.accumulate(np.where(self.drafts < 0, np.arange(len(self.drafts)), 0))


@dataclass(slots=True)
class Encode:
    """An image that becomes embeddings."""

    slot: int  # under which workers keep them from now on
    key: bytes  # of the image
    size: int  # how many embeddings they are
    inputs: dict[str, NDArray[Any]]  # what the vision tower reads


@dataclass(slots=True)
class StepImages:
    """What a step does with images."""

    forget: Ints  # slots whose embeddings are not needed any more
    encode: list[Encode]
    places: Ints  # [E] which of the step's tokens are embeddings of images,
    sources: Ints  # [N, 3] of which slot, from which row to before which: one after another, E in all
    spans: Ints  # [K, 4] from which of the step's tokens to before which one is seen from position to before position


@dataclass(slots=True)
class StepPlan:
    """One step. R requests compute T tokens; S of them draw a token at the end."""

    rows: Ints  # [R]
    starts: Ints  # [R] position of the first token to compute
    counts: Ints  # [R] tokens to compute
    token_ids: Ints  # [T]; -1: the token drawn last for the row, which only the device knows yet; or TO_GUESS
    next_ids: Ints  # of rows that draw nothing: what follows the last token they compute
    draws: Ints  # [R] how many of the last tokens have their logits sampled: one, and one for each draft; 0: none
    page_rows: Ints  # [N] block table entries to set: row,
    page_indexes: Ints  # [N] place in the row,
    page_ids: Ints  # [N] page
    state_reads: Ints  # [R] the page of recurrent state to start from, -1: zeros; empty where the model has none
    state_writes: Ints  # [R] the page to leave it in
    read_rows: Ints  # [D] rows whose tokens a draft model reads before it guesses: from
    read_starts: Ints  # [D] these positions on
    read_counts: Ints  # [D] so many,
    read_ids: Ints  # which are these
    new_rows: list[NewRow] = field(default_factory=list)
    with_prompts: bool = False  # tokens of prompts are among those computed, which a draft model reads as well
    images: StepImages | None = None

    @staticmethod
    def empty() -> "StepPlan":
        """No request at all."""
        none = np.zeros(0, np.int32)
        return StepPlan(none, none, none, none, none, none, none, none, none, none, none, none, none, none, none)

    @property
    def drafted(self) -> bool:
        """Whether there are drafts among its tokens."""
        return bool((self.draws > 1).any())

    def draw_places(self) -> Ints:
        """[S] the places, among the tokens, whose logits are sampled."""
        return _last_of(np.cumsum(self.counts, dtype=np.int32), self.draws)

    def places(self) -> Places:
        """What is drawn there."""
        draws = self.draws
        drafts = np.full(int(draws.sum()), -1, np.int32)
        if self.drafted:
            drafts[:] = self.token_ids[self.draw_places()]
            drafts[(np.cumsum(draws) - draws)[draws > 0]] = -1
        return Places(np.repeat(self.rows, draws), _last_of(self.starts + self.counts, draws) + 1, drafts)


class InFlight(NamedTuple):
    """A step that was planned and is not committed."""

    requests: list[Request]  # of the plan's rows
    num_prompt_tokens: int
    plan: StepPlan

    def charges(self) -> Iterator[tuple[Request, int]]:
        """What each of them gets, as tenants are charged for it (fairness.py): in tokens of a prompt."""
        plan = self.plan
        shares = zip(plan.starts.tolist(), plan.counts.tolist(), plan.draws.tolist(), strict=True)
        for request, (start, count, draws) in zip(self.requests, shares, strict=True):
            yield request, max(0, min(start + count, request.num_given) - start) + OUTPUT_PRICE * (draws > 0)


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
    next_ids: list[int] = field(default_factory=list)
    draws: list[int] = field(default_factory=list)
    pages: list[tuple[int, int, int]] = field(default_factory=list)  # row, place, page
    states: list[tuple[int, int]] = field(default_factory=list)  # read, written
    reads: list[tuple[int, int, int]] = field(default_factory=list)  # row, start, count
    read_ids: list[int] = field(default_factory=list)
    new_rows: list[NewRow] = field(default_factory=list)
    num_prompt_tokens: int = 0  # of those computed, the ones of requests that lacked several
    held: dict[Request, WaitsFor] = field(default_factory=dict)  # what runs and is left out, and the head of the queue

    def begin(self, request: Request) -> None:
        """It has a row, and the pages of its prefix."""
        self.pages.extend((request.row, index, page) for index, page in enumerate(request.pages))
        params = request.params
        log = np.array(request.tokens if params.needs_log else (), np.int32)
        self.new_rows.append(NewRow(request.row, params, request.num_prompt, log, request.images))

    def compute(self, request: Request, end: int) -> None:
        """The tokens of its log up to `end` that are not computed; where that is all, one is drawn."""
        start, log = request.num_computed, request.tokens
        self.budget -= end - start
        self.rows.append(request.row)
        self.starts.append(start)
        self.counts.append(end - start)
        self.token_ids.extend(log[start:end])
        self.draws.append(int(end == len(log)))
        if end < len(log):
            self.next_ids.append(log[end])
        self.num_prompt_tokens += end - start
        self.requests.append(request)

    def read(self, request: Request, length: int, limits: SchedulerLimits) -> bool:
        """Has the draft model, if there is one, read what it lacks of the request's first `length` tokens, and no more
        of all requests than a step may have; False: it will still lack some."""
        if not limits.draft_model:
            return True
        start = request.num_read
        end = min(length, start + limits.max_num_batched_tokens - len(self.read_ids))
        if end > start:
            self.reads.append((request.row, start, end - start))
            self.read_ids.extend(request.tokens[start:end])
            request.num_read = end
        return end == length

    def leave_out(self, requests: Iterable[Request], why: WaitsFor) -> None:
        """They wait, those that have a row still."""
        self.held.update((request, why) for request in requests if request.state is State.RUNNING)

    def waits(self, before: Container[Request]) -> dict[Request, WaitsFor]:
        """What is held; of it, what runs and was not held `before` waits from now on."""
        for request in self.held:
            if request.state is State.RUNNING and request not in before:
                request.waiting_since = self.now
        return self.held

    def plan(self, images: StepImages | None = None) -> StepPlan:
        """Its arrays."""
        pages, states = np.array(self.pages, np.int32).reshape(-1, 3), np.array(self.states, np.int32).reshape(-1, 2)
        reads = np.array(self.reads, np.int32).reshape(-1, 3)
        return StepPlan(
            rows=np.array(self.rows, np.int32),
            starts=np.array(self.starts, np.int32),
            counts=np.array(self.counts, np.int32),
            token_ids=np.array(self.token_ids, np.int32),
            next_ids=np.array(self.next_ids, np.int32),
            draws=np.array(self.draws, np.int32),
            page_rows=pages[:, 0],
            page_indexes=pages[:, 1],
            page_ids=pages[:, 2],
            state_reads=states[:, 0],
            state_writes=states[:, 1],
            read_rows=reads[:, 0],
            read_starts=reads[:, 1],
            read_counts=reads[:, 2],
            read_ids=np.array(self.read_ids, np.int32),
            new_rows=self.new_rows,
            with_prompts=self.num_prompt_tokens > 0,
            images=images,
        )


def _last_of(ends: Ints, counts: Ints) -> Ints:
    """[S] of each row the last `counts` of the numbers before its `ends`, one row after the other."""
    after = np.cumsum(counts, dtype=np.int32)
    total = int(after[-1]) if len(after) else 0
    return np.arange(total, dtype=np.int32) + np.repeat(ends - after, counts)


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

    tokens: Ints  # [S] in the order of the plan's places; REJECTED: none is wanted there; -1: none could be drawn
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)  # row → of its drawn tokens
    prompt_logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)  # row → of this step's prompt tokens
    failed: dict[int, Failure] = field(default_factory=dict)  # by the row: why a token could not be drawn
    vectors: Floats | None = None  # [S, width] in place of tokens (which are 0), of models that pool
    encoder_seconds: float = 0.0  # that images took
    unseen: dict[bytes, str] = field(default_factory=dict)  # by the key of an image: why it could not be encoded
