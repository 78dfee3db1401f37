"""Who computes how many tokens this step. Pure bookkeeping: no torch, no model, no clock of its own.

There is no prefill phase and no decode phase: each step every request may advance `num_computed` towards the length of
its token log, within a budget of tokens. Requests with one token left (decoding) come first, so a long prompt never
stops them; then unfinished prompts; then waiting requests, as pages allow. When pages run out the least important
running request gives its pages back and waits again: its log is kept and recomputed (preemption). Within a class of
priority those tenants go first that were served less (fairness.py); where there is one, those requests that came first.

Drafts (speculation/) are computed behind a request's last token, and a token is drawn behind each as if those before it
had been. Where they prove wrong, what was computed of them is dropped with its pages. A recurrent state has no end that
could be cut off: the one before is kept, and the tokens since are computed again together with the next.

Steps may overlap: `schedule` plans step n + 1 while step n is in flight, whose tokens nobody knows yet. A request then
counts as one token longer, and the plan says -1 for that token: the device has it. Where it was the last one, what was
computed past it is dropped. What a step writes is safe, because steps run in their order: a page given to someone else
meanwhile is written by the later one. A step with drafts overlaps with none: how many it will have drawn is not known.
"""

from bisect import insort
from collections import Counter, deque
from collections.abc import Sequence
from itertools import chain

from quire_engine.cache.images import Inputs
from quire_engine.cache.manager import CacheManager
from quire_engine.config import SchedulerLimits
from quire_engine.errors import DeadlineExceeded, EngineFailure, InvalidParameter
from quire_engine.fairness import Accounts
from quire_engine.outcome import SchedulerStats, StepOutcome
from quire_engine.request import Request, State, check_length
from quire_engine.speculation.speculation import Speculation
from quire_engine.step import REJECTED, InFlight, PlanDraft, StepPlan, StepResult
from quire_engine.turns import Turns
from quire_engine.waiting import Deadlines, Wait, WaitingQueue, WaitsFor


class Scheduler:
    """Owns the requests and the pages. `add`, `abort`, then `schedule` and `commit` in turn."""

    def __init__(self, limits: SchedulerLimits, speculation: Speculation | None = None) -> None:
        """`speculation`: makes drafts."""
        self.limits = limits
        self.speculation = speculation
        self.cache = CacheManager(limits)
        self.pool, self.states, self.images = self.cache.pool, self.cache.states, self.cache.images
        self.stats = SchedulerStats()
        self.requests: dict[int, Request] = {}
        self.running: list[Request] = []  # by class and arrival; tenants that compete are told apart in each plan
        self._deadlines = Deadlines()
        self._rows = list(range(limits.max_num_seqs - 1, -1, -1))
        self._in_flight: deque[InFlight] = deque()  # oldest first
        self._ended: list[Request] = []  # finished outside a commit: aborted, past their deadline
        self._started: list[Request] = []
        self._accounts = Accounts(limits, lambda: chain.from_iterable(step.charges() for step in self._in_flight))
        self._turns = Turns(self._accounts, give_way=self.states is None)
        self._waiting = WaitingQueue(self._accounts)
        self._held: dict[Request, WaitsFor] = {}  # what the last plan left out; replaced, and never changed

    @property
    def context(self) -> int:
        """The longest prompt plus output, in tokens."""
        return min(self.limits.max_model_len, self.limits.num_pages * self.limits.block_size)

    # ---- requests come and go -------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        """Accepted, without a row."""
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.running or self._waiting or self._ended or self._in_flight)

    @property
    def num_in_flight(self) -> int:
        """Steps that were planned and are not committed."""
        return len(self._in_flight)

    def add(self, request: Request) -> None:
        """Accepts a request. Raises InvalidParameter for what no step can compute, ContextTooLong for what can never
        fit, QueueFull (not for one that is resumed), DeadlineExceeded (by arrival)."""
        limits = self.limits
        assert request.id not in self.requests, f"request id {request.id} is used twice"
        request.check(limits.vocab_size)
        check_length(request.num_prompt, request.params.max_tokens, self.context)
        self.cache.accept_images(request)
        if request.deadline and request.deadline <= request.arrival:
            raise DeadlineExceeded("the deadline had passed when the request arrived")
        if not request.resumed:
            self._accounts.check_room(request, self.num_waiting, limits.max_num_queued_reqs + len(self._rows))
        self.requests[request.id] = request
        self._accounts.come(request)
        self._deadlines.add(request)
        done = request.num_output >= request.params.max_tokens  # resumed after its last token was emitted
        if done and (request.num_output or request.params.prompt_logprobs is None):
            self._end(request, "length")
        elif request.params.guidance:
            self._waiting.put_apart(request, State.PREPARING)
        else:
            self._waiting.push(request)

    def prepared(self, request_id: int, error: Exception | None) -> None:
        """A request's grammar is compiled, or cannot be. Unknown ids are ignored: it may have been aborted."""
        request = self._waiting.take_apart(request_id, State.PREPARING)
        if request is not None and error is None:
            self._waiting.push(request)
        elif request is not None:
            self._end(request, "error", error)

    def provide(self, key: bytes, inputs: Inputs) -> None:
        """The pixels of an image that was asked for. Unknown keys are ignored: nobody may want it any more."""
        self._waiting.fetched(self.images.provide(key, inputs) if self.images is not None else ())

    def abort(self, request_id: int) -> None:
        """Ends a request early; its pages are free at once. Unknown ids are ignored: it may just have finished."""
        request = self.requests.get(request_id)
        if request is not None:
            self._withdraw(request, "abort")

    def _withdraw(self, request: Request, reason: str, error: Exception | None = None) -> None:
        """Out of the queue or off its row, its pages given back, and ended."""
        if request.state is State.RUNNING:
            self.running.remove(request)
        self._finish(request, reason, error)
        self._ended.append(request)

    def _vacate(self, request: Request) -> None:
        self._accounts.stop(request)
        self.cache.release(request)
        self._rows.append(request.row)
        request.row = -1

    def _end(self, request: Request, reason: str, error: Exception | None = None) -> None:
        request.finish(reason, error=error)
        self._forget(request)
        self._ended.append(request)

    # ---- a step ---------------------------------------------------------------------------------------------------

    def schedule(self, now: float) -> StepPlan | None:
        """Plans a step; None when there is nothing to compute (a commit may still have something to report)."""
        for request in self._deadlines.passed(now):
            if request.state is not State.FINISHED:
                self._withdraw(request, "error", DeadlineExceeded("the deadline passed before the end"))
        if self._in_flight and self._in_flight[-1].plan.drafted:
            return None
        if self._waiting and self._accounts.contested:
            self._make_way(now)
        guesses = self._guesses()
        if guesses is None:
            return None
        draft = PlanDraft(self.limits.max_num_batched_tokens, now)
        if self.images is not None:
            self.images.begin()
        rows = len(self._rows) if self._waiting else 0
        going, left = self._turns.take(self.running, draft.budget, rows, self._held)
        prompts = self._decode(going, draft, guesses)
        if left:
            self._accounts.settle()
        self._prefill(prompts, draft, drafted=bool(guesses))
        self._admit(draft, drafted=bool(guesses))
        if left:  # tokens that prompts did not take
            draft.leave_out(self._decode(left, draft, guesses), WaitsFor.TURN)
        self._turns.had_prompts = bool(prompts or draft.num_prompt_tokens)
        self._held = draft.waits(self._held)
        if not draft.requests:
            fine = self._in_flight or WaitsFor.IMAGE in draft.held.values()
            assert fine or not (self.running or self._waiting), "requests are left and none can run"
            return None
        if self.states is not None:
            self.states.settle()
        plan = draft.plan(self.images.planned() if self.images is not None else None)
        self._in_flight.append(InFlight(draft.requests, draft.num_prompt_tokens, plan))
        return plan

    def _guesses(self) -> dict[Request, list[int]] | None:
        """The drafts of the next step; None where it should wait for the one in flight. None are made while a prompt is
        being computed, or could be: it needs the tokens and pages."""
        if self.speculation is None or (self._waiting.head is not None and self._rows):
            return {}
        return self.speculation.guesses(self.running, self.limits, in_flight=bool(self._in_flight))

    def _decode(self, running: list[Request], draft: PlanDraft, guesses: dict[Request, list[int]]) -> list[Request]:
        """One token, and its drafts, for each of these that lacks no more; gives the others."""
        states, block_size, budget = self.states, self.limits.block_size, draft.budget
        rows, starts, counts, token_ids, draws = draft.rows, draft.starts, draft.counts, draft.token_ids, draft.draws
        planned, moves = draft.requests, draft.states
        others: list[Request] = []
        for request in self._accounts.in_order(running, min(budget, self.pool.num_free)):
            computed, pending = request.num_computed, request.pending
            length = len(request.tokens) + pending
            lacking = length - computed
            if lacking != 1 + request.again or computed < request.images_end:
                others.append(request)
                continue
            if request.state is not State.RUNNING:
                continue
            if pending and length >= request.end_length:  # the token in flight is its last
                continue
            if budget < lacking:
                others.append(request)
                continue
            if length > len(request.pages) * block_size and not self._grow(request, length, draft):
                continue
            guess = guesses.get(request, []) if guesses else []
            stateless = states is not None and not states.has_room
            if guess and (stateless or not draft.read(request, length, self.limits)):
                guess = []
            if guess:
                most = min(len(guess), budget - lacking)
                guess = guess[: self.cache.room_behind(request, length, most, len(self.running), draft.pages)]
            if states is not None:
                moves.append(states.try_on(request) if guess else states.advance(request))
            budget -= lacking + len(guess)
            rows.append(request.row)
            starts.append(computed)
            counts.append(lacking + len(guess))
            if pending:
                token_ids.append(-1)
            else:
                token_ids.extend(request.tokens[computed:])
                token_ids.extend(guess)
            draws.append(1 + len(guess))
            planned.append(request)
            request.num_computed = length
            request.pending = pending + 1
            if not guess:
                request.again = 0
            if not pending and length % block_size == 0 and not (guess and states is not None):
                self.cache.register(request, length)
        draft.budget = budget
        return others

    def _prefill(self, requests: list[Request], draft: PlanDraft, *, drafted: bool) -> None:
        """What the budget leaves to running requests that lack several tokens, and to waiting ones of their class whose
        tenants were served less than theirs."""
        for request in self._accounts.in_turn(requests):
            if draft.budget and self.states is None:  # with states whoever runs comes first: see Turns
                self._admit(draft, drafted=drafted, before=request)
            if request.state is not State.RUNNING:
                continue
            if draft.budget:
                self._compute(request, draft)
            else:
                draft.held[request] = WaitsFor.BUDGET

    def _admit(self, draft: PlanDraft, *, drafted: bool, before: Request | None = None) -> None:
        """Waiting requests, whose turn it is first, as budget, rows and pages allow. None beside drafts, which may have
        cost another one its row. `before`: only those that go before this one, which runs."""
        while (waiting := self._waiting.head) is not None:
            if before is not None and (waiting in draft.held or not self._accounts.precedes(waiting, before)):
                break
            if not self._rows or drafted:
                draft.held[waiting] = WaitsFor.STEP if self._rows else WaitsFor.ROW
                break
            if not draft.budget:
                draft.held[waiting] = WaitsFor.BUDGET
                break
            if waiting.pending:  # preempted while its next token is in flight
                break
            if self.limits.whole_prompts and len(waiting.tokens) > draft.budget:
                draft.held[waiting] = WaitsFor.WHOLE
                break
            prefix = self.cache.find_prefix(waiting)
            if not self.cache.has_room(waiting, prefix, spare=len(self.running)):  # one each, against thrashing
                draft.held[waiting] = WaitsFor.PAGES
                break
            start = len(prefix) * self.limits.block_size
            if waiting.images_end > start and not self._sees(waiting, start, draft):
                if waiting.state is State.FETCHING:
                    continue
                draft.held[waiting] = WaitsFor.IMAGE
                break
            self._start(waiting, prefix, draft)
            if not self._compute(waiting, draft):  # the room was counted: it cannot happen
                raise AssertionError("an admitted request found no page")

    def _sees(self, waiting: Request, start: int, draft: PlanDraft) -> bool:
        """Whether the head of the queue finds images to begin with. While one is on its way others go on."""
        assert self.images is not None
        end = min(start + draft.budget, len(waiting.tokens))
        reach = self.images.reach(waiting, start, end)
        if reach < end and self.images.park(waiting):
            self._waiting.remove(waiting)
            self._waiting.put_apart(waiting, State.FETCHING)
            return False
        return reach > start

    def _compute(self, request: Request, draft: PlanDraft) -> bool:
        """Tokens of its log within the budget; False where it finds no pages, or not the image that comes next."""
        computed, length, budget = request.num_computed, len(request.tokens), draft.budget
        if self.images is not None and computed < request.images_end:
            budget = self.images.reach(request, computed, computed + budget) - computed
            if not budget:
                draft.held[request] = WaitsFor.IMAGE
                return False
        end = computed + self.cache.chunk(request, budget)
        if not self._grow(request, end, draft):
            return False
        if self.images is not None and computed < request.images_end:
            self.images.compute(request, computed, end, len(draft.token_ids))
        draft.compute(request, end)
        self.cache.note_read(request, computed, end)
        if self.states is not None:
            draft.states.append(self.states.advance(request))
        request.num_computed = end
        self._accounts.charge(request)
        request.pending += end == length
        request.again = max(0, request.again - (end - computed))
        self.cache.register(request, end)
        return True

    def take_started(self) -> list[Request]:
        """What was admitted to a step for the first time since this was last asked."""
        started, self._started = self._started, []
        return started

    def commit(self, result: StepResult | None) -> StepOutcome:
        """Appends what the oldest step in flight drew (None: there is none), frees what is finished, says what
        happened."""
        outcome = StepOutcome(started=self.take_started(), wanted=self.images.take_wanted() if self.images else [])
        if result is not None:
            there = chain(self.requests.values(), *(step.requests for step in self._in_flight))
            for request, why in self.cache.lose_images(result.unseen, there):
                if request.state is not State.FINISHED:  # it ended while the step was in flight
                    self._withdraw(request, "error", EngineFailure(f"an image could not be encoded: {why}"))
            requests, outcome.num_prompt_tokens, plan = self._in_flight.popleft()
            self.stats.saw(plan, result)
            outcome.num_tokens, drawing = len(plan.token_ids), requests
            if not plan.draws.all():
                drawing = [request for request, draws in zip(requests, plan.draws.tolist(), strict=True) if draws]
            self._append(drawing, result, plan, outcome)
            if result.vectors is not None:
                outcome.tell_vectors(drawing, result.vectors)
            if result.logprobs or result.prompt_logprobs:
                outcome.tell_logprobs(requests, plan, result)
        outcome.finished.extend(self._ended)
        self._ended.clear()
        return outcome

    def _append(self, drawing: list[Request], result: StepResult, plan: StepPlan, outcome: StepOutcome) -> None:
        out_requests, out_tokens, out_indexes = outcome.requests, outcome.tokens, outcome.indexes
        finished, running, block_size = outcome.finished, State.RUNNING, self.limits.block_size
        draws = plan.draws[plan.draws > 0].tolist()
        drawn, at = result.tokens.tolist(), 0
        for place, (request, count) in enumerate(zip(drawing, draws, strict=True)):
            tokens = drawn[at : at + count]
            at += count
            if request.state is State.FINISHED:  # it ended while the step was in flight
                continue
            request.pending -= 1
            if count > 1:
                tokens = self._judge(request, tokens)
            log = request.tokens
            for token in tokens:
                if token < 0:
                    why, ours = result.failed[int(plan.rows[plan.draws > 0][place])]
                    kind = InvalidParameter if request.params.restricted and not ours else EngineFailure
                    self._finish(request, "error", error=kind(why))
                elif len(log) == request.end_length:  # nothing was to be generated: only the prompt's scores are wanted
                    self._finish(request, "length")
                else:
                    log.append(token)
                    length = len(log)
                    out_requests.append(request)
                    out_tokens.append(token)
                    out_indexes.append(length - request.num_prompt - 1)
                    if token in request.stop_ids and length > request.min_length:
                        self._finish(request, "stop", stop=token)
                    elif length >= request.end_length:
                        self._finish(request, "length")
                    elif length % block_size == 0 and request.num_computed >= length and request.state is running:
                        self.cache.register(request, length)
                        if self.states is not None:
                            self.states.settle()
                if request.finish_reason is not None:
                    finished.append(request)
                    break
        if finished:
            self.running = [request for request in self.running if request.state is running]

    def _judge(self, request: Request, tokens: list[int]) -> list[int]:
        """Of the tokens drawn behind drafts those that count."""
        drafts = len(tokens) - 1
        if REJECTED in tokens:
            tokens = tokens[: tokens.index(REJECTED)]
        accepted = len(tokens) - 1
        self.cache.judge(request, drafts, accepted)
        request.num_drafts += drafts
        request.num_accepted += accepted
        self.stats.judged(drafts, accepted)
        if self.speculation is not None:
            self.speculation.learn(request, drafts, accepted)
        return tokens

    def _finish(self, request: Request, reason: str, error: Exception | None = None, stop: int | None = None) -> None:
        """Ends a request that the caller takes off the running list."""
        if request.state is State.RUNNING:
            self._vacate(request)
        else:
            self._waiting.remove(request)
        request.finish(reason, stop_token_id=stop, error=error)
        self._forget(request)

    def _forget(self, request: Request) -> None:
        del self.requests[request.id]
        self._accounts.leave(request)
        if self.images is not None and request.images:
            self._waiting.fetched(self.images.forget(request))
        if self.speculation is not None:
            self.speculation.forget(request)

    # ---- pages ----------------------------------------------------------------------------------------------------

    def _grow(self, request: Request, length: int, draft: PlanDraft) -> bool:
        """Pages for `length` tokens, if need be from less important requests not yet planned. False: all of these are
        planned or gone, and the request sits this step out with the pages it had."""
        pages, had = request.pages, len(request.pages)
        for _ in range(had, -(-length // self.limits.block_size)):
            while (page := self.cache.allocate()) is None:
                victim = self._accounts.least_important(self.running, draft.requests)
                if victim is request:
                    self.cache.trim(request)  # where nothing is planned, no worker would be told of what it found
                    draft.held[request] = WaitsFor.PAGES
                    return False
                self._preempt(victim, draft.now)
            pages.append(page)
        draft.pages.extend((request.row, index, pages[index]) for index in range(had, len(pages)))
        return True

    def _make_way(self, now: float) -> None:
        """Where the head of the queue lacks a row or pages, and its tenant has less than its share of them, others that
        have more give some back. It is in this plan, or in the next that has tokens left for it."""
        self._accounts.settle()
        head = self._waiting.head
        if head is None or head.pending or self.limits.whole_prompts:  # which end with the step that they are in
            return
        row = bool(self._rows) and (self.states is None or self.states.has_room)
        wanted = self.cache.needed(head, self.cache.find_prefix(head))
        lacking = wanted + len(self.running) - self.pool.num_free
        if row and lacking <= 0:
            return
        victims = self._accounts.over_share(
            head, rows=int(not row), pages=lacking, wanted=wanted, own_pages=self.cache.own_pages
        )
        for victim in victims:
            self._preempt(victim, now)
        if victims:
            self._waiting.prefer(head)

    def _preempt(self, request: Request, now: float) -> None:
        self.running.remove(request)
        self._vacate(request)
        request.waiting_since = now
        self._waiting.push(request)
        self.stats.preemptions += 1

    def _start(self, request: Request, prefix: list[int], draft: PlanDraft) -> None:
        """The most important waiting request takes a row and the pages of its prefix."""
        self._waiting.remove(request)
        request.state = State.RUNNING
        request.row = self._rows.pop()
        self.cache.take_prefix(request, prefix)
        self._accounts.start(request)
        draft.begin(request)
        if not request.has_run:
            request.num_cached = min(request.num_computed, request.num_prompt)
            self.stats.looked_up(request)
            self._started.append(request)
        insort(self.running, request, key=self._accounts.importance)

    # ---- what requests wait for -----------------------------------------------------------------------------------

    def explain(self, requests: Sequence[Request]) -> list[Wait]:
        """What each of these, which have not ended, waits for as of the last plan. Looks once at all requests, however
        many are asked for."""
        return self._waiting.explain(requests, self.running, self._held)

    def waiting_for(self) -> Counter[WaitsFor]:
        """How many requests wait for what, those too that run and were left out of the last plan. From any thread."""
        return self._waiting.counts(self._held)

    @property
    def queued_tokens(self) -> int:
        """Tokens that are known and in no step yet, of all requests. Other threads may ask."""
        return self._waiting.tokens + sum(request.num_uncomputed for request in self.running)

    # ---- invariants -----------------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raises AssertionError unless pages, rows and states agree. Cheap enough for an idle production engine."""
        self.cache.check_integrity(self.running)
        rows = [request.row for request in self.running]
        assert sorted([*rows, *self._rows]) == list(range(self.limits.max_num_seqs)), "rows are lost or used twice"
        self._waiting.check_integrity(self.requests.values())
        self._accounts.check_integrity(self.requests.values())
        there = {id(request) for request in self.requests.values() if request.state is State.RUNNING}
        assert {id(request) for request in self.running} == there, "the list of what is running is wrong"
