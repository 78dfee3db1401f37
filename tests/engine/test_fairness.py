"""Fairness between tenants: what each is served is measured from plans and outcomes, not from the counters."""

import gc
import hashlib
import math
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
from drafters import Constant, Everything
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quire_engine.config import SchedulerLimits, SpeculativeConfig
from quire_engine.errors import InvalidParameter, QueueFull
from quire_engine.fairness import Account
from quire_engine.request import EngineSampling, Request, State
from quire_engine.scheduler import Scheduler
from quire_engine.speculation.speculation import Speculation
from quire_engine.step import REJECTED, StepPlan, StepResult
from quire_engine.waiting import WaitsFor

STOP = 99
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def limits(**changes: object) -> SchedulerLimits:
    base = {
        "vocab_size": 1 << 31,
        "num_pages": 400,
        "block_size": 4,
        "max_model_len": 100,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "max_num_queued_reqs": 10000,
        "enable_prefix_caching": False,
    }
    return SchedulerLimits(**(base | changes))


@dataclass
class Moment:
    """After a step was planned."""

    served: Counter[str]  # prompt tokens, and twice those drawn, by tenant since the start
    waiting: frozenset[str]  # tenants that have something in the queue


@dataclass
class Story:
    """A scheduler, something that draws, and what each tenant was served."""

    bounds: SchedulerLimits
    drafts: bool = False
    every: int = 1  # step all that is kept is checked after
    recorded: bool = True  # what was served by each moment
    seed: int = 0
    now: float = 0.0
    served: Counter[str] = field(default_factory=Counter)
    moments: list[Moment] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)
    costs: dict[str, int] = field(default_factory=dict)  # the most that one request of a tenant may cost
    preempted: list[tuple[int, Request]] = field(default_factory=list)  # with the step's number
    admitted: list[tuple[int, Request]] = field(default_factory=list)
    finished: list[Request] = field(default_factory=list)
    steps: int = 0
    work: int = 0  # that was asked for

    def __post_init__(self) -> None:
        guesses = Speculation(Constant(), Everything(), 3) if self.drafts else None
        self.scheduler = Scheduler(self.bounds, guesses)
        self.results: deque[StepResult] = deque()
        self.random = np.random.default_rng(self.seed)
        self.covered: dict[Request, int] = {}  # tokens of what it came with that were computed, or found
        self.number = 0

    def add(self, tenant: str, prompt: int | list[int], output: int = 2, **facts: object) -> Request:
        """`prompt`: its tokens, or how many of which nobody else has any."""
        self.number += 1
        tokens = list(prompt) if isinstance(prompt, list) else [1000 + self.number] * prompt
        weight = float(facts.pop("weight", self.weights.get(tenant, 1.0)))
        params = EngineSampling(max_tokens=output, stop_token_ids=(STOP,))
        request = Request(
            self.number, tokens, len(tokens), params, arrival=self.now, tenant=tenant, weight=weight, **facts
        )
        self.scheduler.add(request)
        self.weights[tenant] = weight
        self.costs[tenant] = max(self.costs.get(tenant, 0), len(tokens) + 2 * output)
        self.work += len(tokens) + 2 * output
        return request

    def step(self) -> StepPlan | None:
        scheduler = self.scheduler
        self.now += 1.0
        before = set(scheduler.running)
        plan = scheduler.schedule(self.now)
        after = set(scheduler.running)
        place, self.steps = self.steps, self.steps + 1
        self.preempted += [(place, one) for one in before - after if one.state is State.WAITING]
        self.admitted += [(place, one) for one in after - before]
        if plan is not None:
            self.measure(plan)
            self.results.append(self.draw(plan))
        if self.recorded:
            waiting = frozenset(one.tenant for one in scheduler.requests.values() if one.state is State.WAITING)
            self.moments.append(Moment(Counter(self.served), waiting))
        checked = place % self.every == 0
        if checked:
            self.check_waits()
        due = scheduler.num_in_flight and (plan is None or scheduler.num_in_flight >= self.bounds.steps_in_flight)
        outcome = scheduler.commit(self.results.popleft() if due else None)
        for request in outcome.requests:
            self.served[request.tenant] += 2
        self.finished += outcome.finished
        if checked:
            scheduler.check_integrity()
        return plan

    def measure(self, plan: StepPlan) -> None:
        at = {request.row: request for request in self.scheduler.running}
        for row, start, count in zip(plan.rows.tolist(), plan.starts.tolist(), plan.counts.tolist(), strict=True):
            request = at[row]
            given = request.num_prompt
            known = max(self.covered.get(request, 0), min(start, given))
            end = max(known, min(start + count, given))
            self.served[request.tenant] += end - known
            self.covered[request] = end

    def draw(self, plan: StepPlan) -> StepResult:
        """The same token for all; of drafts as many are right as chance will have."""
        tokens: list[int] = []
        for draws in plan.draws.tolist():
            right = int(self.random.integers(1, draws + 1)) if draws else 0
            tokens += [7] * right + [REJECTED] * (draws - right)
        return StepResult(np.array(tokens, np.int32))

    def check_waits(self) -> None:
        """What is explained is what is counted, and nothing is ahead of what is ahead of all."""
        scheduler = self.scheduler
        asked = list(scheduler.requests.values())
        waits = scheduler.explain(asked)
        assert scheduler.waiting_for() == Counter(wait.reason for wait in waits if wait.reason is not None)
        total = sum(request.num_uncomputed for request in asked)
        assert all(0 <= wait.tokens_ahead <= total for wait in waits)
        assert not asked or min(wait.tokens_ahead for wait in waits) == 0

    def end(self) -> None:
        """Until nothing is left; each step computes something, or waits for one in flight."""
        for _ in range(100 + 10 * self.work):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work, "requests are left that never end"
        assert self.scheduler.pool.num_used == 0

    def bound(self, one: str, other: str) -> float:
        """Of two tenants, over any time in which something of both waits: see quire_engine/fairness.py. What is in
        flight, and what was drawn since the last plan, is measured and not yet charged: a token of each row."""
        rows, weights, costs = self.bounds.max_num_seqs, self.weights, self.costs
        return sum(rows * (costs[tenant] + 3) / weights[tenant] for tenant in (one, other))

    def check_shares(self) -> float:
        """That the theorem holds of every two tenants, over every interval in which both wait. → how much of the bound
        was needed at most."""
        needed = 0.0
        for one, other in combinations(sorted(self.weights), 2):
            least, most = math.inf, -math.inf
            for moment in self.moments:
                if not moment.waiting >= {one, other}:
                    least, most = math.inf, -math.inf
                    continue
                ahead = moment.served[one] / self.weights[one] - moment.served[other] / self.weights[other]
                least, most = min(least, ahead), max(most, ahead)
                assert most - least <= self.bound(one, other), f"{one} and {other} are too far apart"
                needed = max(needed, (most - least) / self.bound(one, other))
        return needed


ARRIVAL = st.tuples(
    st.sampled_from("aabc"),
    st.integers(1, 30),  # prompt
    st.integers(1, 10),  # output
    st.integers(1, 8),  # so many of them
)
EVENT = st.one_of(ARRIVAL, st.integers(0, 60))  # some arrive, or one is aborted


LIVES = given(
    events=st.lists(st.tuples(EVENT, st.integers(0, 4)), min_size=8, max_size=24),
    weights=st.tuples(*[st.sampled_from([0.5, 1.0, 1.0, 2.0, 5.0])] * 3),
    num_pages=st.sampled_from([14, 30, 400]),
    rows=st.sampled_from([1, 2, 4]),
    budget=st.sampled_from([1, 5, 16, 64]),
    caching=st.booleans(),
    depth=st.sampled_from([1, 2]),
    num_states=st.sampled_from([0, 0, 0, 2, 6]),
    drafts=st.booleans(),
    by_priority=st.booleans(),
)
FLOODS = given(
    sizes=st.tuples(*[st.tuples(st.integers(1, 30), st.integers(1, 10))] * 3),
    weights=st.tuples(*[st.sampled_from([0.5, 1.0, 1.0, 3.0])] * 3),
    num_pages=st.sampled_from([24, 400]),
    rows=st.sampled_from([1, 2, 3]),
    budget=st.sampled_from([4, 16, 64]),
    depth=st.sampled_from([1, 2]),
    alone=st.integers(0, 60),
)


@QUICK
@LIVES
def test_random_lives(**life: Any) -> None:
    live(**life)


def test_who_runs_finds_a_state_before_others_begin_with_the_one_it_left() -> None:
    live(
        events=[
            (9, 1),
            (("a", 17, 6, 7), 2),
            (("b", 19, 4, 2), 4),
            (59, 0),
            (("b", 27, 8, 7), 3),
            (("a", 6, 4, 1), 3),
            (("c", 12, 6, 3), 1),
            (("a", 26, 1, 6), 0),
            (("b", 27, 4, 4), 2),
            (57, 4),
            (("c", 22, 10, 1), 3),
            (("b", 29, 4, 3), 3),
            (("c", 15, 9, 1), 1),
            (31, 0),
        ],
        weights=(1.0, 5.0, 2.0),
        num_pages=14,
        rows=4,
        budget=16,
        caching=True,
        depth=1,
        num_states=2,
        drafts=False,
        by_priority=True,
    )


@pytest.mark.slow
@settings(QUICK, max_examples=4000)
@LIVES
def test_thousands_of_lives(**life: Any) -> None:
    live(**life)


@settings(QUICK, max_examples=12)
@FLOODS
def test_floods(**sent: Any) -> None:
    flood(**sent)


@pytest.mark.slow
@settings(QUICK, max_examples=1000)
@FLOODS
def test_a_thousand_floods(**sent: Any) -> None:
    flood(**sent)


def live(
    events: list,
    weights: tuple[float, float, float],
    num_pages: int,
    rows: int,
    budget: int,
    caching: bool,
    depth: int,
    num_states: int,
    drafts: bool,
    by_priority: bool,
) -> None:
    """Nobody starves, and no two tenants of a class are further apart than they may be."""
    bounds = limits(
        num_pages=num_pages,
        max_model_len=min(100, 4 * num_pages),
        max_num_seqs=rows,
        max_num_batched_tokens=budget,
        enable_prefix_caching=caching,
        by_priority=by_priority,
        steps_in_flight=depth,
        num_states=num_states,
        speculation=SpeculativeConfig(method="suffix", num_speculative_tokens=3) if drafts else None,
    )
    story = Story(bounds, drafts)
    story.weights = dict(zip("abc", weights, strict=True))
    story.costs = dict.fromkeys("abc", 0)
    made: list[Request] = []
    for event, steps in events:
        if isinstance(event, int):
            story.scheduler.abort(event)
        else:
            tenant, prompt, output, times = event
            for _ in range(times):
                tokens: int | list[int] = [5] * prompt if caching and len(made) % 2 else prompt
                priority = len(made) % 3 if by_priority else 0
                made.append(story.add(tenant, tokens, output, priority=priority))
        for _ in range(steps):
            story.step()
    story.end()
    assert Counter(one.id for one in story.finished) == Counter(one.id for one in made), "each ends once"
    if not by_priority:
        story.check_shares()


def flood(
    sizes: tuple[tuple[int, int], ...],
    weights: tuple[float, ...],
    num_pages: int,
    rows: int,
    budget: int,
    depth: int,
    alone: int,
) -> None:
    """Many small requests or few long ones, and however long one was alone: who waits gets its share by weight."""
    bounds = limits(num_pages=num_pages, max_num_seqs=rows, max_num_batched_tokens=budget, steps_in_flight=depth)
    story = Story(bounds, every=10)
    for place, tenant in enumerate("abc"):
        prompt, output = sizes[place]
        for _ in range(900 // (prompt + 2 * output) + 3 * rows):
            story.add(tenant, prompt, output, weight=weights[place])
        if not place:
            for _ in range(alone):
                story.step()
    story.end()
    story.check_shares()
    together = [moment for moment in story.moments if len(moment.waiting) == 3]
    assert len(together) > 10, "they did not compete"


@pytest.mark.parametrize("caching", [False, True])
def test_equal_tenants_are_served_alike(caching: bool) -> None:
    """What is not fair is further apart than the bound: what a tenant sends, that the cache has, costs it nothing."""
    story = Story(limits(enable_prefix_caching=caching, max_num_seqs=2, max_num_batched_tokens=64), every=20)
    for number in range(400):
        story.add("small", [3] * 41, 1)
        if number % 5 == 0:
            story.add("large", 40, 9)
    for _ in range(60):
        story.step()
    assert {"small", "large"} <= story.moments[-1].waiting
    assert min(story.served.values()) > 2 * story.bound("small", "large") / 3 or not caching
    story.end()
    assert story.check_shares() > 0
    assert (story.served["small"] < 400 * 10) == caching


def test_nothing_is_saved_by_having_been_idle() -> None:
    """One tenant is served alone for long; then others come, and get their share from then on, and no more."""
    story = Story(limits(max_num_seqs=1), every=20)
    for _ in range(400):
        story.add("busy", 8, 2)
    for _ in range(400):
        story.step()
    assert story.served["busy"] > 10 * (story.costs["busy"] + 3) * 2
    before = Counter(story.served)
    for _ in range(100):
        story.add("idle", 8, 2)
    for _ in range(200):
        story.step()
    gained = {tenant: story.served[tenant] - before[tenant] for tenant in ("busy", "idle")}
    assert abs(gained["busy"] - gained["idle"]) <= story.bound("busy", "idle")
    assert min(gained.values()) > story.bound("busy", "idle")


def test_nothing_is_saved_by_coming_and_going() -> None:
    """A tenant that leaves right after it was served more than others is not forgotten while these wait."""
    story = Story(limits(max_num_seqs=1, max_num_batched_tokens=64), every=20)
    for _ in range(300):
        story.add("patient", 8, 1)
    comes: list[Request] = []
    for _ in range(300):
        if not comes or comes[-1].state is State.FINISHED:
            comes.append(story.add("hasty", 40, 1))
        story.step()
    assert len(comes) > 5
    assert story.served["hasty"] <= story.served["patient"] + story.bound("hasty", "patient")


def test_a_class_is_not_charged_for_another() -> None:
    """A tenant that had urgent requests is not behind with others."""
    story = Story(limits(max_num_seqs=1, by_priority=True))
    for tenant in ("a", "b"):
        for _ in range(100):
            story.add(tenant, 8, 1, priority=1)
    for _ in range(60):
        story.add("a", 8, 1, priority=0)
    story.step()
    while any(one.priority == 0 for one in story.scheduler.requests.values()):
        story.step()
    before = Counter(story.served)
    for _ in range(60):
        story.step()
    gained = {tenant: story.served[tenant] - before[tenant] for tenant in ("a", "b")}
    assert abs(gained["a"] - gained["b"]) <= story.bound("a", "b")
    assert min(gained.values()) > story.bound("a", "b")


@pytest.mark.parametrize("depth", [1, 2])
def test_tenants_take_turns_within_a_step(depth: int) -> None:
    """What one got counts at once: a step's budget does not go to ten of one before the other's first."""
    story = Story(limits(max_num_seqs=20, max_num_batched_tokens=40, steps_in_flight=depth))
    for _ in range(10):
        story.add("many", 5, 3)
    for _ in range(2):
        story.add("few", 5, 3)
    story.step()
    first = [one.tenant for _, one in story.admitted]
    assert first.count("few") == 2
    assert len(first) == 8


def test_tokens_of_a_step_go_to_whom_was_served_less() -> None:
    """Before a long prompt that is being computed."""
    story = Story(limits(max_num_batched_tokens=8, max_num_seqs=4))
    long = story.add("a", 64, 1)
    story.step()
    story.step()
    for _ in range(3):
        story.add("a", 8, 1)
    story.add("b", 8, 1)  # which begins with what a has been served
    short = story.add("b", 8, 1)
    for _ in range(6):
        story.step()
    assert short.num_computed == 0
    assert long.num_computed < 64, "they share"
    assert long.num_computed >= 8 * 4


def test_weights() -> None:
    """Three times the weight is three times the service."""
    story = Story(limits(max_num_seqs=2), every=20)
    for _ in range(300):
        story.add("heavy", 10, 2, weight=3.0)
        story.add("light", 10, 2, weight=1.0)
    for _ in range(250):
        story.step()
    assert story.moments[-1].waiting == {"heavy", "light"}
    ratio = story.served["heavy"] / story.served["light"]
    assert 2.6 < ratio < 3.4


def test_pages_are_taken_from_whom_was_served_most() -> None:
    """Though its request came first, and the other one's last."""
    story = Story(limits(num_pages=18, max_num_seqs=3, max_num_batched_tokens=64))
    first = story.add("a", 8, 20)
    second = story.add("a", 8, 20)
    for _ in range(4):
        story.step()
    late = story.add("b", 8, 20)  # which begins with what a has been served
    for _ in range(8):
        story.step()
    accounts, running = story.scheduler._accounts, story.scheduler.running
    accounts.settle()
    assert len(running) == 3
    assert accounts.least_important(running, []) is second
    assert accounts.least_important(running, [second, first]) is late
    while not story.preempted:
        story.step()
    assert [one for _, one in story.preempted] == [second]
    assert late.state is first.state is State.RUNNING
    story.end()


@settings(QUICK, max_examples=25)
@given(
    weights=st.lists(st.sampled_from([0.3, 1.0, 1.0, 2.0, 7.0]), min_size=2, max_size=6),
    rows=st.integers(2, 12),
    depth=st.sampled_from([1, 2]),
    states=st.booleans(),
    classes=st.booleans(),
)
def test_rows_are_shared_and_nobody_takes_in_turn(
    weights: list[float], rows: int, depth: int, states: bool, classes: bool
) -> None:
    """The first tenant has all rows when the others come, and nothing ends: whoever gave one up takes none, and at the
    end nobody has a row less than its share while another one has a row more."""
    bounds = limits(
        max_num_seqs=rows,
        max_model_len=500,
        num_pages=2000,
        max_num_batched_tokens=64,
        steps_in_flight=depth,
        num_states=rows if states else 0,
        by_priority=classes,
    )
    story = Story(bounds, every=10)
    for place, weight in enumerate(weights):
        for _ in range(rows + 1):
            story.add(f"t{place}", 3, 400, weight=weight, priority=place == 0)
        for _ in range(8 if not place else 0):
            story.step()
    assert len(story.scheduler.running) == rows
    for _ in range(10 * rows):
        story.step()
    last = max((place for place, _ in story.preempted), default=0)
    assert last < len(story.moments) - 4 * rows, "it has not settled"
    takers = {one.tenant for place, one in story.admitted if place >= 8}
    losers = {one.tenant for _, one in story.preempted}
    assert not takers & losers, "a tenant gave up a row, and took one"
    assert len(story.preempted) <= rows
    held = Counter(one.tenant for one in story.scheduler.running)
    due = {f"t{place}": max(1.0, rows * weight / sum(weights)) for place, weight in enumerate(weights)}
    if any(held[tenant] - 1 >= due[tenant] for tenant in due):
        assert all(held[tenant] + 1 > due[tenant] for tenant in due)


def test_pages_are_shared() -> None:
    """One tenant has all pages with rows to spare; another's request gets what it needs of its share, at once."""
    story = Story(limits(num_pages=40, max_num_seqs=16, max_num_batched_tokens=64, enable_prefix_caching=True))
    flood = [story.add("a", 30, 40) for _ in range(12)]
    for _ in range(8):
        story.step()
    assert story.scheduler.pool.num_free < 8
    short = story.add("b", 30, 4)
    begun = len(story.moments)
    while short.state is not State.RUNNING:
        story.step()
    assert len(story.moments) - begun <= 2
    assert {one.tenant for _, one in story.preempted} == {"a"}
    story.end()
    assert all(one.finish_reason == "length" for one in (*flood, short))


@dataclass
class Steps:
    """What each step computes of whom, as the plans say."""

    story: Story
    tokens: list[Counter[Request]] = field(default_factory=list)  # of each step, by request
    drawn: list[set[Request]] = field(default_factory=list)  # of each step, who draws one

    def take(self) -> Counter[str]:
        """One; the tokens of each tenant."""
        plan = self.story.scheduler.schedule(self.story.now)
        self.story.now += 1.0
        assert plan is not None
        at = {request.row: request for request in self.story.scheduler.running}
        rows = [at[row] for row in plan.rows.tolist()]
        self.tokens.append(Counter(dict(zip(rows, plan.counts.tolist(), strict=True))))
        self.drawn.append({one for one, draws in zip(rows, plan.draws.tolist(), strict=True) if draws})
        self.story.results.append(self.story.draw(plan))
        self.story.check_waits()
        waits = self.story.scheduler.explain(self.story.scheduler.running)
        full = plan.counts.sum() == self.story.bounds.max_num_batched_tokens
        assert full or all(wait.reason is not WaitsFor.TURN for wait in waits), "one gave way for nothing"
        if self.story.scheduler.num_in_flight >= self.story.bounds.steps_in_flight:
            self.story.scheduler.commit(self.story.results.popleft())
        self.story.scheduler.check_integrity()
        found: Counter[str] = Counter()
        for request, tokens in self.tokens[-1].items():
            found[request.tenant] += tokens
        return found

    def longest_wait(self, request: Request) -> int:
        """Steps from one in which it draws a token to the next."""
        places = [place for place, drawn in enumerate(self.drawn) if request in drawn]
        return max((after - before for before, after in pairwise([*places, len(self.drawn)])), default=0)


@pytest.mark.parametrize("depth", [1, 2])
def test_prompts_have_their_share_of_every_step_beside_a_flood_that_draws(depth: int) -> None:
    """Of 64 tokens the flood's streams would have 60. A prompt's token counts 1, one drawn 2: a third is drawn. Where a
    step was in flight when the prompts came, they catch up with what it draws, by at most half of each step: a sixth is
    drawn meanwhile."""
    draws = 20 if depth == 1 else 10
    bounds = limits(
        max_num_seqs=80, max_num_batched_tokens=64, num_pages=4000, max_model_len=400, steps_in_flight=depth
    )
    steps = Steps(Story(bounds))
    flood = [steps.story.add("a", 1, 300) for _ in range(60)]
    for _ in range(10):
        assert steps.take() == {"a": 60}
    mine = [steps.story.add("b", 40, 100) for _ in range(5)]
    begun = len(steps.tokens)
    while any(one.num_computed < 40 for one in mine):
        left = sum(40 - one.num_computed for one in mine)
        found = steps.take()
        assert found.total() == 64, "tokens of the step are left over"
        assert found["b"] >= min(left, 40)
        assert len(steps.drawn[-1] & set(flood)) >= draws
        waits = steps.story.scheduler.explain(flood)
        assert {wait.reason for wait in waits} == {None, WaitsFor.TURN}
    assert len(steps.tokens) - begun <= 6, "200 tokens of prompts, and what they drew meanwhile"
    for one in flood:
        assert steps.longest_wait(one) <= math.ceil(60 / draws), "60 streams, of which so many draw in a step"
    for _ in range(3):
        steps.take()
    assert len(steps.tokens[-1]) == 64, "rows that draw are more than the tokens of a step, as they always might be"


def until_first(bounds: SchedulerLimits, flood: int, prompt: int, output: int, ahead: int) -> float:
    """Tokens computed, of whomever, from when ten requests of 64 tokens come, `ahead` steps after a flood, until each
    has its first token: their mean."""
    story = Story(bounds, every=1 << 30, recorded=False)
    computed: deque[int] = deque()  # by steps in flight

    def step() -> int:
        """→ the tokens of the steps that came to their end."""
        plan = story.step()
        if plan is not None:
            computed.append(len(plan.token_ids))
        ended = len(computed) - story.scheduler.num_in_flight
        return sum(computed.popleft() for _ in range(ended))

    for _ in range(flood):
        story.add("a", prompt, output)
    for _ in range(ahead):
        step()
    mine = [story.add("b", 64, 64) for _ in range(10)]
    first: dict[Request, int] = {}
    total = 0
    while len(first) < len(mine):
        total += step()
        first |= {one: total for one in mine if one.num_output and one not in first}
    return sum(first.values()) / len(first)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("rows", [64, 256])
@pytest.mark.parametrize("budget", [128, 256])
def test_a_flood_of_another_tenant_doubles_what_the_first_token_takes_at_most(
    depth: int, rows: int, budget: int
) -> None:
    """200 requests that draw, or whose prompts are being computed, or both; whether they fill the rows or not."""
    bounds = limits(
        num_pages=100_000,
        block_size=16,
        max_model_len=4096,
        max_num_seqs=rows,
        max_num_batched_tokens=budget,
        steps_in_flight=depth,
    )
    alone = until_first(bounds, 0, 1, 1, 0)
    for prompt, output, ahead in ((64, 64, 3), (64, 64, 20), (64, 64, 50), (500, 64, 30), (8, 500, 300)):
        assert until_first(bounds, 200, prompt, output, ahead) <= 2 * alone, (prompt, output, ahead)


@settings(QUICK, max_examples=10)
@given(
    weights=st.tuples(*[st.sampled_from([0.2, 1.0, 1.0, 4.0])] * 3),
    streams=st.integers(1, 40),
    others=st.integers(0, 20),
    budget=st.sampled_from([64, 100]),
    depth=st.sampled_from([1, 2]),
    ahead=st.integers(1, 60),
)
def test_no_stream_stands_still(
    weights: tuple[float, float, float], streams: int, others: int, budget: int, depth: int, ahead: int
) -> None:
    """However far a tenant is ahead that never waits, and however many tokens the prompts of others lack: each of its
    streams has a token within the steps that quire_engine/turns.py states."""
    bounds = limits(
        max_num_seqs=110, max_num_batched_tokens=budget, num_pages=40000, max_model_len=1000, steps_in_flight=depth
    )
    steps = Steps(Story(bounds))
    add = dict(zip("abc", weights, strict=True))
    flood = [steps.story.add("a", 1, 900, weight=add["a"]) for _ in range(streams)]
    more = [steps.story.add("c", 1, 900, weight=add["c"]) for _ in range(others)]
    for place in range(ahead):
        if place % 10 == 0:
            steps.story.add("b", 1, 1, weight=add["b"])  # the last to wait, with a counter that stays behind
        steps.take()
    for _ in range(40):
        steps.story.add("b", 90, 1, weight=add["b"])
    for _ in range(30):
        steps.take()
    present = {"a": streams, "b": 1, "c": others}
    total = sum(add[tenant] for tenant, number in present.items() if number)
    for tenant, group in (("a", flood), ("c", more)):
        draws = max(1, math.floor(budget * add[tenant] / (4 * total)) - 1)
        assert all(steps.longest_wait(one) <= math.ceil(len(group) / draws) for one in group)


def test_nobody_gives_way_for_what_the_cache_has() -> None:
    """Or for what finds no pages."""
    bounds = limits(max_num_seqs=80, max_num_batched_tokens=64, num_pages=700, max_model_len=400)
    steps = Steps(Story(replace(bounds, enable_prefix_caching=True)))
    for _ in range(52):
        steps.story.add("a", 1, 60)
    steps.story.add("b", [3] * 41, 1)
    for _ in range(10):
        steps.take()
    for _ in range(12):
        steps.story.add("b", [3] * 41, 1)
    found = steps.take()
    assert found == {"a": 52, "b": 12}
    for _ in range(40):
        steps.story.add("b", 390, 1)
    while steps.story.scheduler.pool.num_free > 100:
        steps.take()
    for _ in range(20):
        steps.take()


def test_classes_do_not_give_way_to_each_other() -> None:
    """Prompts of one class take no tokens from what another one draws, nor what tenants of that gave up."""
    bounds = limits(max_num_seqs=80, max_num_batched_tokens=64, num_pages=4000, max_model_len=400, by_priority=True)
    steps = Steps(Story(bounds))
    for tenant in ("low", "other"):
        for _ in range(25):
            steps.story.add(tenant, 1, 300, priority=1)
    for _ in range(5):
        assert steps.take().total() == 50
    for tenant in ("high", "other"):
        steps.story.add(tenant, 300, 5, priority=0)
    steps.story.add("low", 300, 5, priority=1)
    for _ in range(20):
        found = steps.take()
        assert found["low"] == 25
        assert found.total() == 64


def test_what_waits_for_another_tenants_turn() -> None:
    story = Story(limits(max_num_seqs=1))
    running, second, third = (story.add("a", 4, 9) for _ in range(3))
    story.step()
    story.step()
    other = story.add("b", 4, 2)
    story.step()
    story.step()
    reasons = [wait.reason for wait in story.scheduler.explain([running, second, third, other])]
    assert reasons == [None, WaitsFor.TURN, WaitsFor.TURN, WaitsFor.ROW]
    assert story.scheduler.waiting_for() == {WaitsFor.TURN: 2, WaitsFor.ROW: 1}
    ahead = [wait.tokens_ahead for wait in story.scheduler.explain([running, other, second, third])]
    assert ahead == sorted(ahead)


def test_a_flood_does_not_shut_others_out() -> None:
    """A tenant alone may fill the queue; then others have their share beside it, and the whole is bounded."""
    story = Story(limits(max_num_queued_reqs=12, max_num_seqs=4))
    for _ in range(16):
        story.add("a", 4)
    story.step()
    with pytest.raises(QueueFull):
        story.add("a", 4)
    for _ in range(6):
        story.add("b", 4)
    with pytest.raises(QueueFull, match="try again"):
        story.add("b", 4)
    others = 0
    with pytest.raises(QueueFull):
        for number in range(100):
            story.add(f"t{number}", 4)
            others += 1
    assert others == 6, "twice as many as one may have alone"
    story.end()


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf, 1e-9, 1e9])
def test_weights_that_are_none(weight: float) -> None:
    with pytest.raises(InvalidParameter, match="weight is"):
        Story(limits()).add("a", 4, weight=weight)


def test_those_that_left_are_forgotten() -> None:
    """Ten thousand tenants come and go beside one that always waits."""
    bounds = limits(max_num_seqs=8, max_num_batched_tokens=64)
    story = Story(bounds, every=500, recorded=False)
    for number in range(10000):
        if number % 5 == 0:
            for _ in range(3):
                last = story.add("always", 20, 2)
            story.step()
        story.add(f"t{number}", 4, 1)
    assert last.state is State.WAITING
    kept = sum(type(one) is Account for one in gc.get_objects())
    here = len({one.tenant for one in story.scheduler.requests.values()})
    assert kept <= here + 1024 + 100, "tenants that left are kept"


def plans(tenant: str, weight: float) -> str:
    """Of a thousand steps in which pages are short, of one tenant."""
    digest = hashlib.sha256()
    for seed in range(6):
        bounds = limits(
            num_pages=14,
            max_model_len=40,
            by_priority=bool(seed % 2),
            steps_in_flight=1 + seed % 3,
            enable_prefix_caching=True,
            num_states=(0, 3)[seed % 2],
        )
        story = Story(bounds)
        generator = np.random.default_rng(seed)
        facts = {"tenant": tenant, "weight": weight} if tenant else {}
        for number in range(300):
            if generator.random() < 0.35:
                prompt = generator.integers(0, 3, generator.integers(1, 28)).tolist()
                params = EngineSampling(max_tokens=int(generator.integers(1, 13)))
                priority = int(generator.integers(0, 3))
                story.scheduler.add(Request(number, prompt, len(prompt), params, priority, float(number), **facts))
            if generator.random() < 0.05 and story.scheduler.requests:
                story.scheduler.abort(int(generator.choice(list(story.scheduler.requests))))
            plan = story.scheduler.schedule(float(number))
            if plan is not None:
                for part in (plan.rows, plan.starts, plan.counts, plan.token_ids, plan.page_ids, plan.state_writes):
                    digest.update(part.tobytes())
                story.results.append(story.draw(plan))
            flying = story.scheduler.num_in_flight
            due = flying and (plan is None or flying >= bounds.steps_in_flight)
            story.scheduler.commit(story.results.popleft() if due else None)
    return digest.hexdigest()


def test_one_tenant_alone_is_served_by_priority_and_arrival() -> None:
    """Plan by plan what a scheduler that knows no tenants makes of it; whatever the tenant's name and weight."""
    assert plans("", 1.0) == plans("alone", 7.0) == ONE_TENANT


ONE_TENANT = "43e6a32368fb5db74c3122693c971f7295a2bb306fd4790c2beb1fb58e8d91c6"
