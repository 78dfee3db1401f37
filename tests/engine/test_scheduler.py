"""The scheduler without a model: random lives of requests, with every invariant checked at every step."""

import sys
import threading
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from drafters import Constant, Everything, Oracle, speculation
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quire_engine.config import SchedulerLimits, SpeculativeConfig
from quire_engine.errors import ContextTooLong, DeadlineExceeded, QueueFull
from quire_engine.outcome import StepOutcome
from quire_engine.request import EngineSampling, Request, State
from quire_engine.scheduler import Scheduler
from quire_engine.speculation.draft import Drafter
from quire_engine.speculation.speculation import Speculation
from quire_engine.speculation.workers import WorkersDrafter
from quire_engine.step import REJECTED, TO_GUESS, StepPlan, StepResult, TokenLogprobs
from quire_engine.waiting import WaitsFor

STOP = 99


class FakeModel:
    """Draws as a pure function of the log, as a model does: what a request gets depends on nothing but itself.

    It keeps what the pages hold, so a wrong block table, a page written by two or a stale prefix shows at once; and,
    as a device does, the token drawn last for each row. A recurrent state is all that it has seen. Its results wait
    until they are collected. Its draft model goes by what it has read, and is `wrong` so often on purpose.
    """

    def __init__(self, limits: SchedulerLimits, wrong: float = 0.0) -> None:
        self.size = limits.block_size
        self.memory = np.full((limits.num_pages, limits.block_size), -1)
        self.drawn = np.zeros(limits.max_num_seqs, np.int64)
        self.results: deque[StepResult] = deque()
        self.tables = np.zeros((limits.max_num_seqs, limits.num_pages + 1), np.int64)
        self.states: list[list[int]] | None = [[-1]] * limits.num_states if limits.num_states else None
        self.read = np.full_like(self.memory, -1)  # by the draft model
        self.wrong, self.random = wrong, np.random.default_rng(0)

    def guess(self, plan: StepPlan) -> None:
        """The tokens that the plan leaves open."""
        tokens = iter(plan.read_ids.tolist())
        for row, start, count in zip(plan.read_rows, plan.read_starts, plan.read_counts, strict=True):
            for position in range(start, start + count):
                self.read[self.tables[row, position // self.size], position % self.size] = next(tokens)
        at = 0
        for row, start, count in zip(plan.rows, plan.starts, plan.counts, strict=True):
            for place in range(at, at + count):
                if plan.token_ids[place] == TO_GUESS:
                    length = start + place - at
                    log = [int(self.read[self.tables[row, p // self.size], p % self.size]) for p in range(length)]
                    log.append(next_token(log) if self.random.random() >= self.wrong else 7)
                    plan.token_ids[place] = log[-1]
                    if place + 1 < at + count:
                        self.read[self.tables[row, length // self.size], length % self.size] = log[-1]
            at += count

    def execute(self, plan: StepPlan) -> StepResult:
        self.tables[plan.page_rows, plan.page_indexes] = plan.page_ids
        self.guess(plan)
        at = 0
        spans = []
        for row, start, count in zip(plan.rows.tolist(), plan.starts.tolist(), plan.counts.tolist(), strict=True):
            for position in range(start, start + count):  # every write of the step comes before its reads
                token = plan.token_ids[at] if plan.token_ids[at] >= 0 else self.drawn[row]
                self.memory[self.tables[row, position // self.size], position % self.size] = token
                if plan.with_prompts:
                    self.read[self.tables[row, position // self.size], position % self.size] = token
                at += 1
            spans.append((row, start + count))
        assert at == len(plan.token_ids)
        if self.states is not None:
            self.move_states(plan, self.states)
        drawn = []
        for (row, length), draws in zip(spans, plan.draws.tolist(), strict=True):
            seen = [int(self.memory[self.tables[row, p // self.size], p % self.size]) for p in range(length)]
            right = True
            for behind in range(draws - 1, -1, -1):
                token = next_token(seen[: length - behind])
                drawn.append(token if right else REJECTED)
                right = right and (not behind or token == seen[length - behind])
                self.drawn[row] = token
        return StepResult(np.array(drawn, np.int32))

    def move_states(self, plan: StepPlan, states: list[list[int]]) -> None:
        """All are read before any is written, and each is of the tokens before the request's next."""
        reads, writes = plan.state_reads.tolist(), plan.state_writes.tolist()
        assert len(set(writes)) == len(writes) == len(plan.rows), "two requests leave their states in one page"
        begun = [list(states[page]) if page >= 0 else [] for page in reads]
        for row, start, count, log, page in zip(
            plan.rows.tolist(), plan.starts.tolist(), plan.counts.tolist(), begun, writes, strict=True
        ):
            tokens = [int(self.memory[self.tables[row, p // self.size], p % self.size]) for p in range(start + count)]
            assert log == tokens[:start], "a request goes on from a state that is not its own"
            assert page not in [read for read, write in zip(reads, writes, strict=True) if write != page], (
                "a page is written that another request reads in the same step"
            )
            states[page] = tokens


def reason(scheduler: Scheduler, request: Request) -> WaitsFor | None:
    [wait] = scheduler.explain([request])
    return wait.reason


def waiting_first(scheduler: Scheduler) -> list[Request]:
    """What waits, the most important first."""
    waiting = [request for request in scheduler.requests.values() if request.state is State.WAITING]
    by_priority = scheduler.limits.by_priority
    return sorted(waiting, key=lambda r: (r.priority if by_priority else 0, r.arrival, r.id))


def check_waits(scheduler: Scheduler) -> None:
    """Whatever waits has a reason, reasons are counted, and tokens are those of a plain look at every log."""
    asked = list(reversed(scheduler.requests.values()))
    waits = dict(zip(asked, scheduler.explain(asked), strict=True))
    waiting, preempted = waiting_first(scheduler), 0
    ahead = 0
    for request in (*scheduler.running, *waiting):
        assert waits[request].tokens_ahead == ahead
        ahead += max(0, len(request.tokens) - request.num_computed)
    for place, request in enumerate(waiting):
        why, since = waits[request].reason, waits[request].since
        if request.num_cached >= 0:
            preempted += 1
            assert why is WaitsFor.PREEMPTED
            assert since >= request.arrival
            continue
        assert since == request.arrival
        if place:
            first = waiting[0].priority < request.priority and scheduler.limits.by_priority
            assert why is (WaitsFor.PRIORITY if first else WaitsFor.EARLIER)
        else:
            assert why in (WaitsFor.STEP, WaitsFor.ROW, WaitsFor.BUDGET, WaitsFor.PAGES)
    for request in scheduler.running:
        assert waits[request].reason in (None, WaitsFor.BUDGET, WaitsFor.PAGES)
    reasons = Counter(wait.reason for wait in waits.values() if wait.reason is not None)
    assert scheduler.waiting_for() == reasons
    assert reasons.total() == len(waiting) + sum(waits[r].reason is not None for r in scheduler.running)
    late = ahead - scheduler.queued_tokens  # tokens that were in flight when their request was preempted
    assert 0 <= late <= preempted * (scheduler.limits.steps_in_flight - 1)


def check_reasons(scheduler: Scheduler, plan: StepPlan | None) -> None:
    """They are those of the plan just made. (None is made while drafts are in flight.)"""
    if plan is None and scheduler.speculation is not None:
        return
    bounds, running = scheduler.limits, scheduler.running
    planned = set(plan.rows.tolist()) if plan is not None else set()
    spent = plan is not None and len(plan.token_ids) == bounds.max_num_batched_tokens
    for request in running:
        why = reason(scheduler, request)
        if request.row in planned:
            assert why is None
        elif why is None:
            assert request.pending, "it gets nothing, waits for no result, and is said to run"
            assert len(request.tokens) + request.pending >= request.end_length
        elif why is WaitsFor.BUDGET:
            assert spent
    if (waiting := waiting_first(scheduler)) and waiting[0].num_cached < 0:
        why, length = reason(scheduler, waiting[0]), len(waiting[0].tokens)
        if why is WaitsFor.PAGES:
            short = scheduler.pool.num_free < -(-length // bounds.block_size) + len(running)
            assert short or scheduler.states is not None  # of which there were too few, while the plan was made
        elif why is WaitsFor.BUDGET:
            assert spent
        elif why is WaitsFor.STEP:
            assert plan is not None
            assert plan.drafted or (scheduler.speculation is not None and scheduler.stats.preemptions)
        else:
            assert why is WaitsFor.ROW
        assert (why is WaitsFor.ROW) == (len(running) == bounds.max_num_seqs)


def next_token(log: list[int]) -> int:
    return (sum((i + 1) * token for i, token in enumerate(log)) * 31 + 7) % 100


def expected_output(request: Request, prompt: list[int]) -> list[int]:
    log = list(prompt)
    while len(log) < request.end_length:
        log.append(next_token(log))
        if log[-1] == STOP and len(log) > request.min_length:
            break
    return log[len(prompt) :]


def following(request: Request, count: int) -> list[int]:
    log = list(request.tokens)
    for _ in range(count):
        log.append(next_token(log))
    return log[len(request.tokens) :]


def limits(**changes: int | bool) -> SchedulerLimits:
    base = {
        "vocab_size": 1 << 31,
        "num_pages": 12,
        "block_size": 4,
        "max_model_len": 40,
        "max_num_seqs": 5,
        "max_num_batched_tokens": 16,
        "max_num_queued_reqs": 1000,
        "enable_prefix_caching": True,
        "by_priority": False,
    }
    return SchedulerLimits(**(base | changes))


def step(scheduler: Scheduler, model: FakeModel, now: float) -> StepOutcome:
    plan = scheduler.schedule(now)
    depth = scheduler.limits.steps_in_flight
    if plan is not None:
        assert len(plan.token_ids) <= scheduler.limits.max_num_batched_tokens
        assert len(set(plan.rows.tolist())) == len(plan.rows), "a row is planned twice"
        assert plan.counts.min() > 0, "a step without progress"
        assert not (plan.drafted and plan.with_prompts), "drafts beside prompts"
        model.results.append(model.execute(plan))
    check_waits(scheduler)
    check_reasons(scheduler, plan)
    waits = scheduler.num_in_flight and (plan is None or scheduler.num_in_flight >= depth)
    return scheduler.commit(model.results.popleft() if waits else None)


REQUEST = st.tuples(
    st.lists(st.integers(0, 3), min_size=1, max_size=30),  # few different tokens: many shared prefixes
    st.integers(1, 12),  # max_tokens
    st.integers(0, 3),  # min_tokens
    st.integers(-2, 2),  # priority
    st.sampled_from([0.0, 0.0, 0.0, 5.0, 20.0]),  # deadline, after its arrival
    st.sampled_from([b"", b"other"]),  # salt
)
EVENT = st.one_of(REQUEST, st.integers(0, 30))  # a request arrives, or an old one (by number) is aborted


QUICK = settings(max_examples=90, deadline=None, suppress_health_check=list(HealthCheck))
LIVES = given(
    events=st.lists(st.tuples(EVENT, st.integers(0, 3)), min_size=20, max_size=60),
    num_pages=st.sampled_from([10, 12, 30]),
    budget=st.sampled_from([1, 5, 16, 64]),
    caching=st.booleans(),
    by_priority=st.booleans(),
    depth=st.sampled_from([1, 2, 3]),
    num_states=st.sampled_from([0, 0, 1, 3, 12]),
    wrong=st.sampled_from([None, None, 0.0, 0.2, 0.5, 1.0]),
    by_model=st.booleans(),
)


@QUICK
@LIVES
def test_random_lives(**life: Any) -> None:
    live(**life)


@settings(QUICK, max_examples=25)
@LIVES
def test_lives_by_a_draft_model(**life: Any) -> None:
    live(**(life | {"wrong": 0.0, "by_model": True, "caching": False}))


@pytest.mark.slow
@settings(QUICK, max_examples=5000)
@LIVES
def test_thousands_of_lives_with_drafts(**life: Any) -> None:
    live(**(life | {"wrong": life["wrong"] or 0.0}))


def live(
    events: list,
    num_pages: int,
    budget: int,
    caching: bool,
    by_priority: bool,
    depth: int,
    num_states: int,
    wrong: float | None,
    by_model: bool,
) -> None:
    """`wrong`: the share of drafts' tokens that are not what follows; None: there are no drafts. `by_model`: they are
    those of a draft model, which has to read what it goes by."""
    bounds = limits(
        num_pages=num_pages,
        max_num_batched_tokens=budget,
        enable_prefix_caching=caching,
        by_priority=by_priority,
        steps_in_flight=depth,
        num_states=num_states,
        speculation=SpeculativeConfig(
            method="draft_model" if by_model else "suffix", model="any" if by_model else None, num_speculative_tokens=4
        ),
    )
    drafter: Drafter = WorkersDrafter() if by_model else Oracle(following, wrong or 0.0)
    guesses = None if wrong is None else speculation(drafter)
    scheduler, model = Scheduler(bounds, guesses), FakeModel(bounds, wrong or 0.0)
    prompts: dict[int, list[int]] = {}
    alive: dict[int, Request] = {}
    endings: dict[int, int] = {}
    aborted: set[int] = set()
    now = 0.0

    def advance() -> None:
        nonlocal now
        now += 1.0
        outcome = step(scheduler, model, now)
        scheduler.check_integrity()
        for request in outcome.finished:
            endings[request.id] = endings.get(request.id, 0) + 1

    for number, (event, steps) in enumerate(events):
        if isinstance(event, int):
            aborted.add(event)
            scheduler.abort(event)
        else:
            prompt, max_tokens, min_tokens, priority, patience, salt = event
            params = EngineSampling(
                max_tokens=max_tokens, min_tokens=min(min_tokens, max_tokens), stop_token_ids=(STOP,)
            )
            deadline = now + patience if patience else 0.0
            request = Request(
                number,
                list(prompt),
                len(prompt),
                params,
                priority=priority,
                arrival=now,
                deadline=deadline,
                cache_salt=salt,
            )
            try:
                scheduler.add(request)
                check_waits(scheduler)
            except ContextTooLong:
                assert len(prompt) + max_tokens > min(40, num_pages * 4)
                continue
            prompts[number], alive[number] = prompt, request
        for _ in range(steps):
            advance()
    for _ in range(3000):
        if not scheduler.has_work:
            break
        advance()
    assert not scheduler.has_work, "requests are left that never run"
    assert scheduler.pool.num_used == 0
    assert scheduler.states is None or scheduler.states.pool.num_used == 0
    if by_model and wrong == 0.0 and not caching:  # else a prefix may have been computed and not read
        assert scheduler.stats.accepted_tokens == scheduler.stats.draft_tokens, "it had not read what it went by"
    for number, request in alive.items():
        assert endings.get(number) == 1, "every request ends once"
        output = request.tokens[request.num_prompt :]
        whole = expected_output(request, prompts[number])
        if request.finish_reason in ("stop", "length"):
            assert output == whole
        else:
            assert output == whole[: len(output)]
            assert (
                number in aborted if request.finish_reason == "abort" else isinstance(request.error, DeadlineExceeded)
            )


@pytest.mark.parametrize("seed", range(4))
def test_a_long_run(seed: int) -> None:
    """Thousands of steps under constant pressure: pages for about two requests, arrivals and aborts throughout."""
    bounds = limits(num_pages=14, by_priority=bool(seed % 2), steps_in_flight=1 + seed // 2)
    scheduler, model = Scheduler(bounds), FakeModel(bounds)
    generator = np.random.default_rng(seed)
    prompts: dict[int, list[int]] = {}
    finished: list[Request] = []
    for number in range(2500):
        if generator.random() < 0.35:
            prompt = generator.integers(0, 3, generator.integers(1, 28)).tolist()
            params = EngineSampling(max_tokens=int(generator.integers(1, 13)), stop_token_ids=(STOP,))
            prompts[number] = prompt
            scheduler.add(
                Request(number, list(prompt), len(prompt), params, int(generator.integers(0, 3)), float(number))
            )
        if generator.random() < 0.05 and scheduler.requests:
            scheduler.abort(int(generator.choice(list(scheduler.requests))))
        finished += step(scheduler, model, float(number)).finished
        scheduler.check_integrity()
    while scheduler.has_work:
        finished += step(scheduler, model, 1e6).finished
    scheduler.check_integrity()
    assert scheduler.stats.preemptions >= 15, "the pressure is gone"
    assert scheduler.stats.prefix_hits >= 50, "nothing is shared"
    assert {request.id for request in finished} == prompts.keys()
    for request in finished:
        whole = expected_output(request, prompts[request.id])
        output = request.tokens[request.num_prompt :]
        assert output == (whole if request.finish_reason != "abort" else whole[: len(output)])


def request(number: int, length: int, max_tokens: int = 4, **facts: object) -> Request:
    return Request(number, [number + 1] * length, length, EngineSampling(max_tokens=max_tokens), **facts)


def test_what_can_never_fit_is_refused_and_blocks_nobody() -> None:
    scheduler = Scheduler(limits())
    with pytest.raises(ContextTooLong, match="max_tokens"):
        scheduler.add(request(1, 38, 4))
    with pytest.raises(ContextTooLong, match="shorten the prompt"):
        scheduler.add(request(2, 40, 1))
    scheduler.add(request(3, 30))
    assert scheduler.schedule(0.0) is not None


def test_the_queue_is_bounded() -> None:
    scheduler = Scheduler(limits(max_num_queued_reqs=2))
    for number in range(5 + 2):
        scheduler.add(request(number, 4))
    with pytest.raises(QueueFull, match="try again"):
        scheduler.add(request(9, 4))
    resumed = request(10, 4)
    resumed.resumed = True
    scheduler.add(resumed)  # it was accepted elsewhere
    assert scheduler.num_waiting == 8


@pytest.mark.parametrize("depth", [2, 3])
def test_overlapped_steps_keep_the_device_busy(depth: int) -> None:
    """Each step is planned before the one before it is committed, and the plan leaves the unknown token open."""
    bounds = limits(num_pages=40, steps_in_flight=depth)
    scheduler, model = Scheduler(bounds), FakeModel(bounds)
    alone = request(1, 5, 9)
    scheduler.add(alone)
    plans = []
    for _ in range(depth):
        plan = scheduler.schedule(0.0)
        assert plan is not None
        plans.append(plan)
        model.results.append(model.execute(plan))
    assert [plan.token_ids.tolist() for plan in plans[1:]] == [[-1]] * (depth - 1)
    while scheduler.has_work:
        scheduler.commit(model.results.popleft())
        if (plan := scheduler.schedule(0.0)) is not None:
            model.results.append(model.execute(plan))
    assert alone.tokens[5:] == expected_output(alone, [2] * 5)


def test_a_long_prompt_does_not_stop_decoding() -> None:
    bounds = limits(num_pages=40, max_num_batched_tokens=6)
    scheduler, model = Scheduler(bounds), FakeModel(bounds)
    first = request(1, 4, 12)
    scheduler.add(first)
    step(scheduler, model, 0.0)
    scheduler.add(request(2, 30))
    for _ in range(5):
        before = len(first.tokens)
        step(scheduler, model, 0.0)
        assert len(first.tokens) == before + 1


def test_pages_found_for_a_step_that_is_not_planned() -> None:
    """The third finds one page of the two it needs, and the tokens in flight are the last of the others: nothing is
    planned, so no worker is told of that page."""
    bounds = limits(
        num_pages=13, block_size=1, max_num_batched_tokens=4, steps_in_flight=2, enable_prefix_caching=False
    )
    scheduler, model = Scheduler(bounds), FakeModel(bounds)
    asked = [request(1, 1, 3), request(2, 1, 3), request(3, 8)]
    for one in asked:
        scheduler.add(one)
    for _ in range(3):
        step(scheduler, model, 0.0)
    plan = scheduler.schedule(0.0)
    assert plan is None
    assert reason(scheduler, asked[2]) is WaitsFor.PAGES
    while scheduler.has_work:
        if scheduler.num_in_flight:
            scheduler.commit(model.results.popleft())
        step(scheduler, model, 0.0)
        scheduler.check_integrity()
    for one in asked:
        prompt = one.tokens[: one.num_prompt]
        assert one.tokens[one.num_prompt :] == expected_output(one, prompt)


class Waiting(Everything):
    """In place of `Value`: waits for any draft."""

    def worth_waiting(self, requests: Sequence[Request], *args: object, **facts: object) -> bool:
        return bool(requests)


def test_no_step_waits_for_drafts_that_no_token_is_left_for() -> None:
    """The token in flight is the last but one."""
    bounds = limits(steps_in_flight=2, speculation=SpeculativeConfig(method="suffix", num_speculative_tokens=4))
    scheduler, model = Scheduler(bounds, Speculation(Constant(), Waiting(), 4)), FakeModel(bounds)
    alone = request(1, 5, 2)
    scheduler.add(alone)
    for tokens in (5, 1):
        plan = scheduler.schedule(0.0)
        assert plan is not None
        assert len(plan.token_ids) == tokens
        model.results.append(model.execute(plan))
    while scheduler.has_work:
        scheduler.commit(model.results.popleft())
    assert alone.tokens[5:] == expected_output(alone, [2] * 5)


def test_priorities() -> None:
    bounds = limits(by_priority=True, max_num_seqs=1)
    scheduler, model = Scheduler(bounds), FakeModel(bounds)
    for number, priority in enumerate((3, 1, 2)):
        scheduler.add(request(number, 4, 1, priority=priority, arrival=float(number)))
    order = [done.id for _ in range(3) for done in step(scheduler, model, 0.0).finished]
    assert order == [1, 2, 0]


def test_what_waits_for_a_row_or_for_whatever_is_ahead() -> None:
    bounds = limits(by_priority=True, max_num_seqs=1, num_pages=30)
    scheduler, model = Scheduler(bounds), FakeModel(bounds)
    running, second, third, last = (
        request(number, 4 + number, 3, priority=priority, arrival=float(number))
        for number, priority in enumerate((0, 1, 1, 2))
    )
    for one in (last, running, third, second):
        scheduler.add(one)
    assert reason(scheduler, running) is WaitsFor.STEP
    step(scheduler, model, 5.0)
    waits = scheduler.explain([last, third, second, running])
    assert [wait.reason for wait in waits] == [WaitsFor.PRIORITY, WaitsFor.EARLIER, WaitsFor.ROW, None]
    assert [wait.since for wait in waits[:3]] == [3.0, 2.0, 1.0]
    assert [wait.tokens_ahead for wait in waits] == [1 + 5 + 6, 1 + 5, 1, 0]  # one token is drawn and not computed
    assert scheduler.queued_tokens == 1 + 5 + 6 + 7
    scheduler.abort(second.id)
    assert reason(scheduler, third) is WaitsFor.STEP, "nobody has looked yet whether there is a row for it"


def test_what_waits_for_pages_goes_on_once_they_are_free() -> None:
    scheduler, model = Scheduler(limits()), FakeModel(limits())
    scheduler.add(request(1, 36, 4, arrival=1.0))
    late = request(2, 12, 4, arrival=2.0)
    scheduler.add(late)
    told = []
    for now in range(50):
        if not scheduler.has_work:
            break
        step(scheduler, model, 3.0 + now)
        if late.state is State.WAITING:
            told.append((reason(scheduler, late), scheduler.pool.num_free))
    assert told[0] == (WaitsFor.BUDGET, 8), "the first prompt takes all of the first step"
    assert (WaitsFor.PAGES, 3) in told
    assert told[-1] == (WaitsFor.PAGES, 12), "the first has just ended"
    assert late.finish_reason == "length"


def test_a_running_request_waits_from_the_first_step_that_leaves_it_out() -> None:
    """Beside what decodes, the first of two prompts stops at the end of a block, and leaves the other one some tokens;
    alone it takes the whole budget."""
    bounds = limits(num_pages=40, max_num_batched_tokens=8, num_states=8)
    scheduler, model = Scheduler(bounds), FakeModel(bounds)
    prompt = request(3, 20, 1)
    scheduler.add(request(1, 1, 2))
    step(scheduler, model, 1.0)
    scheduler.add(request(2, 36, 1))
    scheduler.add(prompt)
    seen: list[tuple[float, WaitsFor | None, float]] = []
    now = 1.0
    while prompt.state is not State.FINISHED:
        now += 1.0
        step(scheduler, model, now)
        if prompt.state is State.RUNNING:
            [wait] = scheduler.explain([prompt])
            seen.append((now, wait.reason, wait.since))
    held = [(now, since) for now, why, since in seen if why is WaitsFor.BUDGET]
    assert held == [(3.0, 3.0), (4.0, 3.0), (5.0, 3.0), (6.0, 3.0)]
    assert [why for now, why, _ in seen if now not in (3.0, 4.0, 5.0, 6.0)] == [None, None, None]


def test_what_was_preempted_waits_from_then_on() -> None:
    bounds = limits(num_pages=9, max_num_batched_tokens=64)
    scheduler, model = Scheduler(bounds), FakeModel(bounds)
    first, second = request(1, 15, 20, arrival=1.0), request(2, 15, 20, arrival=2.0)
    scheduler.add(first)
    scheduler.add(second)
    now, preempted = 3.0, 0.0
    while scheduler.has_work:
        now += 1.0
        step(scheduler, model, now)
        if second.state is State.WAITING:
            preempted = preempted or now
            [wait] = scheduler.explain([second])
            assert (wait.reason, wait.since) == (WaitsFor.PREEMPTED, preempted)
    assert preempted, "pages sufficed"
    assert second.finish_reason == "length"


def test_a_prompt_that_must_be_whole_waits_for_a_step() -> None:
    bounds = limits(num_pages=40, whole_prompts=True)
    scheduler = Scheduler(bounds)
    first, second = request(1, 10), request(2, 10)
    scheduler.add(first)
    scheduler.add(second)
    assert scheduler.schedule(0.0) is not None
    assert reason(scheduler, second) is WaitsFor.WHOLE
    assert scheduler.waiting_for() == {WaitsFor.WHOLE: 1}


def test_another_thread_may_count() -> None:
    """While requests come, go and are preempted."""
    bounds = limits(num_pages=14, by_priority=True)
    scheduler, model = Scheduler(bounds), FakeModel(bounds)
    generator = np.random.default_rng(0)
    done, errors, counted = threading.Event(), [], []

    def count() -> None:
        while not done.is_set():
            try:
                counted.append((scheduler.waiting_for().total(), scheduler.queued_tokens))
            except Exception as error:
                errors.append(error)
                return

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=count)
    try:
        thread.start()
        for number in range(600):
            length, priority = int(generator.integers(1, 28)), int(generator.integers(0, 50))
            scheduler.add(request(number, length, 6, priority=priority, arrival=float(number)))
            if generator.random() < 0.7:
                scheduler.abort(int(generator.choice(list(scheduler.requests))))
            step(scheduler, model, float(number))
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(before)
    assert not errors
    assert max(total for total, _ in counted) > 5
    assert min(tokens for _, tokens in counted) >= 0


def test_requests_of_one_step_share_a_prefix() -> None:
    scheduler = Scheduler(limits(num_pages=30, max_num_batched_tokens=64))
    for number in range(3):
        scheduler.add(Request(number, [7] * 17, 17, EngineSampling()))
    plan = scheduler.schedule(0.0)
    assert plan is not None
    assert plan.counts.tolist() == [17, 1, 1]
    assert scheduler.pool.num_used == 4 + 3


def test_salts_do_not_share() -> None:
    scheduler = Scheduler(limits(num_pages=30, max_num_batched_tokens=64))
    for number, salt in enumerate((b"", b"tenant")):
        scheduler.add(Request(number, [7] * 17, 17, EngineSampling(), cache_salt=salt))
    plan = scheduler.schedule(0.0)
    assert plan is not None
    assert plan.counts.tolist() == [17, 17]


def test_a_resumed_request_goes_on() -> None:
    bounds = limits(num_pages=30)
    prompt = [3, 1, 4, 1, 5]
    whole = expected_output(request(0, 5, 12), prompt)
    scheduler, model = Scheduler(bounds), FakeModel(bounds)
    resumed = Request(1, prompt + whole[:7], 5, EngineSampling(max_tokens=12))
    complete = Request(2, prompt + whole, 5, EngineSampling(max_tokens=12))
    scheduler.add(resumed)
    scheduler.add(complete)
    while scheduler.has_work:
        step(scheduler, model, 0.0)
    assert resumed.tokens == prompt + whole
    assert complete.finish_reason == "length"
    assert resumed.state is State.FINISHED


@pytest.mark.parametrize("depth", [1, 2])
def test_a_prompt_is_scored_without_an_output(depth: int) -> None:
    """It is computed whole, in chunks if it is long; what is drawn at its end is nobody's, and its scores are told."""
    bounds = limits(num_pages=30, max_num_batched_tokens=8, max_model_len=60)
    scheduler, model = Scheduler(bounds), FakeModel(bounds)
    prompt = [number % 7 for number in range(20)]
    scored = Request(1, list(prompt), 20, EngineSampling(max_tokens=0, prompt_logprobs=0))
    plain = Request(2, list(prompt), 20, EngineSampling(max_tokens=0))
    beside = request(3, 5, 6)
    for one in (scored, plain, beside):
        scheduler.add(one)
    told, tokens, plans = 0, [], []
    now = 0.0
    while scheduler.has_work:
        while len(plans) < depth and (plan := scheduler.schedule(now)) is not None:
            plans.append((plan, model.execute(plan)))
        result = None
        if plans:
            plan, result = plans.pop(0)
            if scored.row in plan.rows.tolist() and scored.state is State.RUNNING:
                place = plan.rows.tolist().index(scored.row)
                count = min(int(plan.starts[place] + plan.counts[place]), 19) - int(plan.starts[place])
                result.prompt_logprobs[scored.row] = some_scores(count)
        outcome = scheduler.commit(result)
        told += sum(len(part.chosen) for one, _, part in outcome.prompt_logprobs if one is scored)
        tokens += [one.id for one in outcome.requests]
        scheduler.check_integrity()
    assert told == 19
    assert set(tokens) == {3}
    assert len(tokens) == 6
    assert [one.finish_reason for one in (scored, plain, beside)] == ["length"] * 3
    assert scored.tokens == plain.tokens == prompt


def some_scores(count: int) -> TokenLogprobs:
    ids, values = np.zeros(count, np.int32), np.zeros(count, np.float32)
    return TokenLogprobs(ids, values, ids, np.zeros((count, 0), np.int32), np.zeros((count, 0), np.float32))


def test_waste_stays_within_the_last_page() -> None:
    bounds = limits(num_pages=200, block_size=16, max_model_len=400, max_num_seqs=8, max_num_batched_tokens=512)
    scheduler, model = Scheduler(bounds), FakeModel(bounds)
    for number in range(8):
        scheduler.add(Request(number, [number] * 200, 200, EngineSampling(max_tokens=150)))
    for _ in range(120):
        step(scheduler, model, 0.0)
        allocated, unused = scheduler.cache.slots(scheduler.running)
        running = len(scheduler.running)
        assert unused <= 15 * running
    assert running == 8
    assert unused / allocated < 0.04


def test_one_state_for_all() -> None:
    """A request goes on from the only state there is, in its place."""
    bounds = limits(num_states=1)
    scheduler, model = Scheduler(bounds), FakeModel(bounds)
    requests = []
    for number, prompt in enumerate(([1, 2, 3, 0], [1, 2, 3, 0, 2, 2])):
        requests.append(Request(number, prompt, len(prompt), EngineSampling(max_tokens=1)))
        scheduler.add(requests[-1])
        while scheduler.has_work:
            step(scheduler, model, 1.0)
            scheduler.check_integrity()
    assert [request.finish_reason for request in requests] == ["length", "length"]
    assert requests[1].num_cached == 4
