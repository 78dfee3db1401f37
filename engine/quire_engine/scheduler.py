"""Who computes how many tokens this step. Pure bookkeeping: no torch, no model, no clock of its own.

There is no prefill phase and no decode phase: each step every request may advance `num_computed` towards the length
of its token log, within a budget of tokens. Requests with one token left (decoding) come first, so a long prompt
never stops them; then unfinished prompts; then waiting requests, as pages allow. When pages run out the least
important running request gives its pages back and waits again: its log is kept and recomputed (preemption by
recomputation).

Steps may overlap: `schedule` plans step n + 1 while step n is in flight, whose tokens nobody knows yet. A request then
counts as one token longer, and the plan says -1 for that token: the device has it. Where it turns out to have been the
last one, what was computed past it is dropped. Whatever a step writes is safe, because steps run in their order: a page
given to someone else meanwhile is written by the later step.
"""

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from quire_engine.cache.pages import PagePool, block_hash
from quire_engine.cache.states import StatePages
from quire_engine.config import SchedulerLimits
from quire_engine.errors import DeadlineExceeded, EngineFailure, QueueFull
from quire_engine.request import Request, State, check_length
from quire_engine.step import Floats, NewRow, StepPlan, StepResult, TokenLogprobs


@dataclass(slots=True)
class StepOutcome:
    """What a step did. The first lists run side by side: one entry per new token."""

    requests: list[Request] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    finished: list[Request] = field(default_factory=list)
    started: list[Request] = field(default_factory=list)  # admitted for the first time
    logprobs: list[tuple[Request, TokenLogprobs]] = field(default_factory=list)
    prompt_logprobs: list[tuple[Request, int, TokenLogprobs]] = field(default_factory=list)  # with the first's place
    vectors: list[tuple[Request, Floats]] = field(default_factory=list)  # of models that pool
    num_tokens: int = 0  # computed


@dataclass(slots=True)
class SchedulerStats:
    """Counters since the start."""

    preemptions: int = 0
    prefix_queries: int = 0  # tokens looked up
    prefix_hits: int = 0  # tokens found


class Scheduler:
    """Owns the requests and the pages. `add`, `abort`, then `schedule` and `commit` in turn."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self.limits = limits
        self.pool = PagePool(limits.num_pages)
        self.states = StatePages(limits.num_states) if limits.num_states else None
        self.stats = SchedulerStats()
        self.requests: dict[int, Request] = {}
        self.running: list[Request] = []  # most important first
        self._waiting: list[tuple[tuple[int, float, int], Request]] = []  # a heap
        self._num_waiting = 0  # the heap also holds aborted requests until they surface
        self._deadlines: list[tuple[float, int]] = []  # a heap of (deadline, request id)
        self._rows = list(range(limits.max_num_seqs - 1, -1, -1))
        self._planned: list[Request] = []  # by the plan that is being made
        self._in_flight: deque[tuple[list[Request], StepPlan]] = deque()  # oldest first
        self._ended: list[Request] = []  # finished outside a commit: aborted, past their deadline
        self._started: list[Request] = []
        self._importance: Callable[[Request], tuple[int, float, int]] = (
            (lambda r: (r.priority, r.arrival, r.id)) if limits.by_priority else (lambda r: (0, r.arrival, r.id))
        )

    @property
    def context(self) -> int:
        """The longest prompt plus output, in tokens."""
        return min(self.limits.max_model_len, self.limits.num_pages * self.limits.block_size)

    # ---- requests come and go -------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        """Accepted, without a row."""
        return self._num_waiting

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.running or self._num_waiting or self._ended or self._in_flight)

    @property
    def num_in_flight(self) -> int:
        """Steps that were planned and are not committed."""
        return len(self._in_flight)

    def add(self, request: Request) -> None:
        """Accepts a request. Raises ContextTooLong for what can never fit, QueueFull, DeadlineExceeded (by arrival)."""
        limits = self.limits
        assert request.id not in self.requests, f"request id {request.id} is used twice"
        check_length(request.num_prompt, request.params.max_tokens, self.context)
        if request.deadline and request.deadline <= request.arrival:
            raise DeadlineExceeded("the deadline had passed when the request arrived")
        if self._num_waiting >= limits.max_num_queued_reqs + len(self._rows):
            raise QueueFull(f"{self._num_waiting} requests wait already; try again later")
        self.requests[request.id] = request
        if request.deadline:
            heapq.heappush(self._deadlines, (request.deadline, request.id))
        if request.num_output >= request.params.max_tokens:  # resumed after its last token was emitted
            self._end(request, "length")
            return
        self._wait(request)

    def abort(self, request_id: int) -> None:
        """Ends a request early; its pages are free at once. Unknown ids are ignored: it may just have finished."""
        request = self.requests.get(request_id)
        if request is not None:
            self._withdraw(request)
            self._end(request, "abort")

    def _wait(self, request: Request) -> None:
        request.state = State.WAITING
        heapq.heappush(self._waiting, (self._importance(request), request))
        self._num_waiting += 1

    def _withdraw(self, request: Request) -> None:
        """Out of the queue or off its row, its pages given back."""
        if request.state is State.RUNNING:
            self.running.remove(request)
            self._vacate(request)
        else:
            self._num_waiting -= 1  # the heap entry is skipped when it surfaces

    def _vacate(self, request: Request) -> None:
        self.pool.release(reversed(request.pages))
        if self.states is not None:
            self.states.release(request)
        request.pages = []
        request.num_registered = 0
        request.num_computed = 0
        self._rows.append(request.row)
        request.row = -1

    def _end(self, request: Request, reason: str, error: Exception | None = None) -> None:
        request.finish(reason, error=error)
        del self.requests[request.id]
        self._ended.append(request)

    def _expire(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            _, request_id = heapq.heappop(self._deadlines)
            request = self.requests.get(request_id)
            if request is not None:
                self._withdraw(request)
                self._end(request, "error", DeadlineExceeded("the deadline passed before the end"))

    # ---- a step ---------------------------------------------------------------------------------------------------

    def schedule(self, now: float) -> StepPlan | None:
        """Plans a step; None when there is nothing to compute (a commit may still have something to report)."""
        self._expire(now)
        limits, block_size = self.limits, self.limits.block_size
        budget = limits.max_num_batched_tokens
        rows: list[int] = []
        starts: list[int] = []
        counts: list[int] = []
        token_ids: list[int] = []
        draws: list[bool] = []
        page_updates: list[tuple[int, int, int]] = []
        new_rows: list[NewRow] = []
        states, moves = self.states, []
        planned = self._planned = []
        prefilling: list[Request] = []

        for request in tuple(self.running):  # decoding: one token each
            computed, pending = request.num_computed, request.pending
            length = len(request.tokens) + pending
            if length - computed != 1:
                prefilling.append(request)
                continue
            if budget == 0 or request.state is not State.RUNNING:
                continue
            if pending and length >= request.end_length:  # the token in flight is its last
                continue
            if computed == len(request.pages) * block_size and not self._grow(request, computed + 1, page_updates):
                continue
            budget -= 1
            rows.append(request.row)
            starts.append(computed)
            counts.append(1)
            token_ids.append(-1 if pending else request.tokens[-1])
            draws.append(True)
            planned.append(request)
            if states is not None:
                moves.append(states.advance(request))
            request.num_computed = computed + 1
            request.pending = pending + 1
            if not pending and (computed + 1) % block_size == 0:
                self._register(request, computed + 1)

        def take(request: Request) -> bool:
            nonlocal budget
            computed, length = request.num_computed, len(request.tokens)
            count = self._chunk(request, budget)
            if not self._grow(request, computed + count, page_updates):
                return False
            budget -= count
            rows.append(request.row)
            starts.append(computed)
            counts.append(count)
            token_ids.extend(request.tokens[computed : computed + count])
            draws.append(computed + count == length)
            planned.append(request)
            if states is not None:
                moves.append(states.advance(request))
            request.num_computed = computed + count
            request.pending += computed + count == length
            self._register(request, computed + count)
            return True

        for request in prefilling:
            if budget and request.state is State.RUNNING:
                take(request)

        while budget and self._rows and (waiting := self._next_waiting()) is not None:
            if waiting.pending:  # preempted while its next token is in flight
                break
            if limits.whole_prompts and len(waiting.tokens) > budget:
                break
            hits = self._cached_prefix(waiting)
            if not self._room_for(waiting, hits):
                break
            self._admit(waiting, hits, page_updates, new_rows)
            if not take(waiting):  # the room was counted: it cannot happen
                raise AssertionError("an admitted request found no page")

        if not planned:
            assert self._in_flight or not (self.running or self._num_waiting), "requests are left and none can run"
            return None
        if states is not None:
            states.settle()
        updates, state_moves = np.array(page_updates, np.int32).reshape(-1, 3), np.array(moves, np.int32).reshape(-1, 2)
        plan = StepPlan(
            rows=np.array(rows, np.int32),
            starts=np.array(starts, np.int32),
            counts=np.array(counts, np.int32),
            token_ids=np.array(token_ids, np.int32),
            draws=np.array(draws, np.bool_),
            page_rows=updates[:, 0],
            page_indexes=updates[:, 1],
            page_ids=updates[:, 2],
            state_reads=state_moves[:, 0],
            state_writes=state_moves[:, 1],
            new_rows=new_rows,
        )
        self._in_flight.append((planned, plan))
        return plan

    def commit(self, result: StepResult | None) -> StepOutcome:
        """Appends what the oldest step in flight drew (None: there is none), frees what is finished, says what
        happened."""
        outcome = StepOutcome(started=self._started)
        self._started = []
        if result is not None:
            requests, plan = self._in_flight.popleft()
            outcome.num_tokens = len(plan.token_ids)
            if plan.draws.all():
                drawing = requests
            else:
                drawing = [request for request, draws in zip(requests, plan.draws.tolist(), strict=True) if draws]
            self._append(drawing, result, plan, outcome)
            if result.vectors is not None:
                told = {id(request) for request in outcome.requests}
                for request, vector in zip(drawing, result.vectors, strict=True):
                    if id(request) in told:
                        outcome.vectors.append((request, vector))
            if result.logprobs or result.prompt_logprobs:
                self._collect_logprobs(requests, plan, result, outcome)
        if self._ended:
            outcome.finished.extend(self._ended)
            self._ended = []
        return outcome

    def _append(self, drawing: list[Request], result: StepResult, plan: StepPlan, outcome: StepOutcome) -> None:
        out_requests, out_tokens, finished = outcome.requests, outcome.tokens, outcome.finished
        failed = {}
        if result.failed:
            place_of = {row: place for place, row in enumerate(plan.rows[plan.draws].tolist())}
            failed = {id(drawing[place_of[row]]): why for row, why in result.failed.items()}
        block_size = self.limits.block_size
        running, finished_state = State.RUNNING, State.FINISHED
        for request, token in zip(drawing, result.tokens.tolist(), strict=True):
            if request.state is finished_state:  # it ended while the step was in flight
                continue
            request.pending -= 1
            if failed and id(request) in failed:
                self._finish(request, "error", error=EngineFailure(failed[id(request)]))
                finished.append(request)
                continue
            tokens = request.tokens
            tokens.append(token)
            length = len(tokens)
            out_requests.append(request)
            out_tokens.append(token)
            if token in request.stop_ids and length > request.min_length:
                self._finish(request, "stop", stop_token_id=token)
                finished.append(request)
            elif length >= request.end_length:
                self._finish(request, "length")
                finished.append(request)
            elif length % block_size == 0 and request.num_computed >= length and request.state is running:
                self._register(request, length)
                if self.states is not None:
                    self.states.settle()
        if finished:
            self.running = [request for request in self.running if request.state is running]

    def _finish(
        self, request: Request, reason: str, *, stop_token_id: int | None = None, error: Exception | None = None
    ) -> None:
        """Ends a request in a commit, which takes it off the running list afterwards."""
        if request.state is State.RUNNING:
            self._vacate(request)
        else:
            self._num_waiting -= 1  # preempted meanwhile; the heap entry is skipped when it surfaces
        request.finish(reason, stop_token_id=stop_token_id, error=error)
        del self.requests[request.id]

    def _collect_logprobs(
        self, requests: list[Request], plan: StepPlan, result: StepResult, outcome: StepOutcome
    ) -> None:
        """Each position is reported once: a preempted request computes its prompt again, and a request that ended
        while the step was in flight has no use for it."""
        told = {id(request) for request in outcome.requests}
        for request, row, first in zip(requests, plan.rows.tolist(), plan.starts.tolist(), strict=True):
            if (drawn := result.logprobs.get(row)) is not None and id(request) in told:
                outcome.logprobs.append((request, drawn))
            scores = result.prompt_logprobs.get(row)
            if scores is not None and (id(request) in told or request.state is not State.FINISHED):
                fresh = scores.after(max(0, request.num_scored - first))
                if len(fresh.chosen):
                    outcome.prompt_logprobs.append((request, request.num_scored, fresh))
                    request.num_scored += len(fresh.chosen)

    # ---- pages ----------------------------------------------------------------------------------------------------

    def _grow(self, request: Request, length: int, page_updates: list[tuple[int, int, int]]) -> bool:
        """Pages for `length` tokens, if need be from less important requests not yet planned.

        False: everything less important is planned or gone, and the request sits this step out with the pages it has.
        """
        pages = request.pages
        for index in range(len(pages), -(-length // self.limits.block_size)):
            while (page := self.pool.allocate()) is None:
                victim = self._victim()
                if victim is request:
                    return False
                self._preempt(victim)
            pages.append(page)
            page_updates.append((request.row, index, page))
        return True

    def _victim(self) -> Request:
        """The least important running request that is not in the plan yet."""
        planned = {id(request) for request in self._planned}
        return next(request for request in reversed(self.running) if id(request) not in planned)

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._vacate(request)
        self._wait(request)
        self.stats.preemptions += 1

    def _register(self, request: Request, computed: int) -> None:
        """Lets blocks full of computed tokens be found.

        This runs while the plan is made: a layer writes the keys and values of the whole batch before any of its
        attention reads, so even a request of the same step may share them.
        """
        if not self.limits.enable_prefix_caching:
            return
        full = computed // self.limits.block_size
        if full > request.num_registered:
            hashes = self._hashes(request, full)
            for index in range(request.num_registered, full):
                self.pool.register(request.pages[index], hashes[index])
            request.num_registered = full
            if self.states is not None and request.num_computed == full * self.limits.block_size:
                self.states.leave(request, hashes[full - 1])

    def _hashes(self, request: Request, count: int) -> list[bytes]:
        hashes, size = request.block_hashes, self.limits.block_size
        while (at := len(hashes) * size) < count * size:
            previous = hashes[-1] if hashes else request.cache_salt
            hashes.append(block_hash(previous, request.tokens[at : at + size]))
        return hashes

    def _next_waiting(self) -> Request | None:
        while self._waiting:
            request = self._waiting[0][1]
            if request.state is State.WAITING:
                return request
            heapq.heappop(self._waiting)
        return None

    def _cached_prefix(self, request: Request) -> list[int]:
        """Pages that hold the request's first blocks; at least one token is always left to compute."""
        if not self.limits.enable_prefix_caching or request.params.prompt_logprobs is not None:
            return []
        count = (len(request.tokens) - 1) // self.limits.block_size
        found: list[int] = []
        for index in range(count):
            page = self.pool.knows(self._hashes(request, index + 1)[index])
            if page is None:
                break
            found.append(page)
        if self.states is not None:
            hashes, known = request.block_hashes, len(found)
            while found and self.states.pool.knows(hashes[len(found) - 1]) is None:
                found.pop()
            request.checkpoint = known * self.limits.block_size if known > len(found) else 0
        return found

    def _chunk(self, request: Request, budget: int) -> int:
        """How many tokens of a prompt to compute next: with recurrent states, up to where one is worth keeping."""
        computed, length = request.num_computed, len(request.tokens)
        end = min(length, computed + budget)
        if self.states is not None and self.limits.enable_prefix_caching:
            if computed < request.checkpoint < end:
                end = request.checkpoint
            elif end < length and end // self.limits.block_size * self.limits.block_size > computed:
                end -= end % self.limits.block_size
        return end - computed

    def _room_for(self, request: Request, hits: list[int]) -> bool:
        """Whether all its tokens so far find pages, with one to spare for each running request (against thrashing)."""
        needed = -(-len(request.tokens) // self.limits.block_size) - len(hits)
        needed += sum(self.pool.is_idle(page) for page in hits)
        if self.states is not None and not self.states.has_room:
            return False
        spare = len(self.running)
        return needed + spare <= self.pool.num_free

    def _admit(
        self,
        request: Request,
        hits: list[int],
        page_updates: list[tuple[int, int, int]],
        new_rows: list[NewRow],
    ) -> None:
        heapq.heappop(self._waiting)
        self._num_waiting -= 1
        request.state = State.RUNNING
        request.row = self._rows.pop()
        for index, page in enumerate(hits):
            self.pool.find(request.block_hashes[index])
            request.pages.append(page)
            page_updates.append((request.row, index, page))
        if self.states is not None and hits:
            request.state_page = self.states.start(request.block_hashes[len(hits) - 1])
        request.num_computed = len(hits) * self.limits.block_size
        request.num_registered = len(hits)
        if request.num_cached < 0:
            request.num_cached = min(request.num_computed, request.num_prompt)
            self.stats.prefix_queries += len(request.tokens)
            self.stats.prefix_hits += request.num_computed
            self._started.append(request)
        params = request.params
        needs_log = params.edits_logits or params.prompt_logprobs is not None
        new_rows.append(NewRow(request.row, params, request.num_prompt, list(request.tokens) if needs_log else []))
        running = self.running
        running.append(request)
        if len(running) > 1 and self._importance(running[-2]) > self._importance(request):
            running.sort(key=self._importance)

    # ---- invariants -----------------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raises AssertionError unless pages, rows and states agree. Cheap enough for an idle production engine."""
        self.pool.check_integrity(request.pages for request in self.running)
        if self.states is not None:
            self.states.pool.check_integrity([r.state_page] for r in self.running if r.state_page >= 0)
        rows = [request.row for request in self.running]
        assert sorted([*rows, *self._rows]) == list(range(self.limits.max_num_seqs)), "rows are lost or used twice"
        waiting = [request for request in self.requests.values() if request.state is State.WAITING]
        assert len(waiting) == self._num_waiting, "the count of waiting requests is wrong"
        queued = {entry[1].id for entry in self._waiting if entry[1].state is State.WAITING}
        assert {request.id for request in waiting} <= queued, "a waiting request is not in the queue"
        assert {id(r) for r in self.running} == {id(r) for r in self.requests.values() if r.state is State.RUNNING}, (
            "the running list is wrong"
        )
        for request in self.running:
            assert len(request.pages) * self.limits.block_size >= request.num_computed, "tokens without a page"

    def slots(self) -> tuple[int, int]:
        """Token slots of held pages, and how many of them hold nothing (PagedAttention's only waste)."""
        allocated = self.pool.num_used * self.limits.block_size
        size = self.limits.block_size
        unused = sum(len(r.pages) * size - r.num_computed for r in self.running)
        return allocated, unused
