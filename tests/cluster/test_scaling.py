"""How many replicas are wanted: properties of single looks, and of a small simulated deployment that obeys."""

import copy
import math
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

from hypothesis import example, given, settings
from hypothesis import strategies as st
from quire_cluster.policies.scaling import Observed, Rules, Scaling

RATE = 1000.0  # tokens per second of a replica
SIZE = 100  # tokens of a prompt
ROWS = 64


class Deployment:
    """Replicas that compute a queue of prompts, asked and changed once a second. Load is in replicas kept busy."""

    def __init__(self, rules: Rules, start_seconds: int, *, serving: int) -> None:
        self.rules, self.start_seconds, self.serving = rules, start_seconds, serving
        self.scaling = Scaling()
        self.starts: list[int] = []  # when they will serve
        self.now = 0
        self.queue = 0.0  # tokens
        self.computed = 0.0  # in the last second
        self.counts: list[int] = []  # wanted, by second

    @property
    def backlog(self) -> float:
        return self.queue / (RATE * self.serving)

    def observed(self) -> Observed:
        requests = math.ceil(self.queue / SIZE)
        running = min(requests, self.serving)  # prompts are computed one after the other
        return Observed(
            now=self.now,
            serving=self.serving,
            starting=len(self.starts),
            start_seconds=self.start_seconds,
            running=running,
            waiting=requests - running if self.serving else 0,
            at_gateways=0 if self.serving else requests,
            queued_tokens=int(self.queue) if self.serving else 0,
            tokens_at_gateways=0 if self.serving else int(self.queue),
            prefill_rate=RATE,
            computed=self.computed,
            most_running=ROWS,
        )

    def second(self, load: float) -> None:
        self.now += 1
        self.queue += load * RATE
        self.computed = min(self.queue, self.serving * RATE)
        self.queue -= self.computed
        self.serving += sum(start <= self.now for start in self.starts)
        self.starts = [start for start in self.starts if start > self.now]
        wanted = self.scaling.wanted(self.rules, self.observed())
        assert self.rules.min_replicas <= wanted <= self.rules.max_replicas
        self.counts.append(wanted)
        more = wanted - self.serving - len(self.starts)
        self.starts += [self.now + self.start_seconds] * more
        for _ in range(-more):
            if self.starts:
                self.starts.pop()
            else:
                self.serving -= 1

    def run(self, seconds: int, load: Callable[[int], float]) -> None:
        for _ in range(seconds):
            self.second(load(self.now))

    def changes(self) -> list[tuple[int, int]]:
        """(second, +1 or -1) of each change."""
        return [(t, 1 if b > a else -1) for t, (a, b) in enumerate(pairwise(self.counts), 1) if a != b]

    def turns(self) -> list[int]:
        """Seconds of the changes that go the other way than the one before."""
        return [t for (_, before), (t, after) in pairwise(self.changes()) if before != after]


@st.composite
def looks(draw: st.DrawFn) -> tuple[Rules, Observed]:
    """Anything that could be seen, and asked; `now` is seconds since the look before."""
    bounds = sorted(draw(st.tuples(st.integers(0, 20), st.integers(0, 20))))
    count, tokens = st.integers(0, 20), st.integers(0, 10**6)
    rules = Rules(min_replicas=bounds[0], max_replicas=bounds[1], idle_seconds=draw(st.sampled_from((0, 3, 300))))
    return rules, Observed(
        now=draw(st.floats(0, 10)),
        age=draw(st.sampled_from((0.0, 1.0, 60.0))),
        serving=draw(count),
        starting=draw(count),
        start_seconds=draw(st.sampled_from((0.0, 1.0, 60.0))),
        running=draw(st.integers(0, 500)),
        waiting=draw(st.integers(0, 500)),
        at_gateways=draw(st.integers(0, 500)),
        queued_tokens=draw(tokens),
        tokens_at_gateways=draw(tokens),
        prefill_rate=draw(st.sampled_from((0.0, 1e-3, 1e3, 1e6))),
        computed=draw(st.floats(0, 1e6)),
        usage=draw(st.floats(0, 1)),
        most_running=draw(st.sampled_from((0, 1, 64))),
    )


def after(history: list[tuple[Rules, Observed]]) -> tuple[Scaling, float, int]:
    """Having looked at all that: (it, the time, what was wanted last)."""
    scaling, now, wanted = Scaling(), 0.0, 0
    for rules, seen in history:
        now += seen.now
        wanted = scaling.wanted(rules, replace(seen, now=now))
        assert rules.min_replicas <= wanted <= rules.max_replicas
        assert scaling.reason
    return scaling, now, wanted


@given(st.lists(looks(), min_size=1, max_size=12), st.lists(st.integers(0, 10**6), min_size=2, max_size=2))
def test_whatever_is_seen_the_bounds_hold_and_a_larger_backlog_wants_no_fewer(
    history: list[tuple[Rules, Observed]], tokens: list[int]
) -> None:
    *before, (rules, seen) = history
    scaling, now, _ = after(before)
    fewer, more = (
        copy.deepcopy(scaling).wanted(rules, replace(seen, now=now + seen.now, queued_tokens=count))
        for count in sorted(tokens)
    )
    assert rules.min_replicas <= fewer <= more <= rules.max_replicas


@given(st.lists(looks(), min_size=1, max_size=6), st.lists(looks(), min_size=1, max_size=6))
def test_old_reports_change_nothing_but_the_bounds_are_obeyed(
    history: list[tuple[Rules, Observed]], stale: list[tuple[Rules, Observed]]
) -> None:
    scaling, now, wanted = after(history)
    for rules, seen in stale:
        now += seen.now
        wanted = min(max(wanted, rules.min_replicas), rules.max_replicas)
        assert scaling.wanted(rules, replace(seen, now=now, age=12.0)) == wanted
        assert scaling.reason.startswith("reports are 12 s old: holding")


def test_time_without_reports_is_not_idle_time() -> None:
    rules, scaling = Rules(min_replicas=1, max_replicas=4, idle_seconds=100), Scaling()
    for now in range(0, 1000, 10):
        age = 0.0 if now % 20 else 12.0
        assert scaling.wanted(rules, Observed(now=now, age=age, serving=4)) == 4
    scaling = Scaling()
    assert scaling.wanted(rules, Observed(now=0, serving=4)) == 4
    assert scaling.wanted(rules, Observed(now=3600, serving=4)) == 4, "nobody looked for an hour"


@given(
    load=st.floats(0.05, 12),
    before=st.floats(0, 12),
    start=st.integers(1, 120),
    noise=st.sampled_from((0.0, 0.2)),
    seed=st.integers(0, 99),
)
@example(load=2.9, before=0.5, start=60, noise=0.0, seed=0)
@settings(max_examples=40, deadline=None)
def test_a_load_that_stays_is_met_and_then_left_alone(
    load: float, before: float, start: int, noise: float, seed: int
) -> None:
    """Whatever the load was before: up to what it needs, perhaps down once, and not up again."""
    generator = random.Random(seed)
    rules = Rules(min_replicas=1, max_replicas=100, idle_seconds=120)
    deployment = Deployment(rules, start, serving=1)
    deployment.run(1000, lambda _: before * (1 + noise * generator.uniform(-1, 1)))
    changed = deployment.now
    deployment.run(6000, lambda _: load * (1 + noise * generator.uniform(-1, 1)))
    assert deployment.backlog <= rules.target_backlog
    assert load < deployment.counts[-1] <= load / 0.7 + 2
    late = [way for second, way in deployment.changes() if second > 5000]
    assert not late if not noise else all(way < 0 for way in late), "it has settled, but for a quiet time by chance"
    assert len([turn for turn in deployment.turns() if turn > changed]) <= 2


@given(load=st.floats(1.5, 20), start=st.integers(5, 300))
@settings(max_examples=40, deadline=None)
def test_replicas_that_start_are_waited_for(load: float, start: int) -> None:
    """While the queue grows before them, no more are wanted than what comes in needs."""
    deployment = Deployment(Rules(min_replicas=1, max_replicas=1000), start, serving=1)
    deployment.run(60, lambda _: 0.5)
    while not deployment.starts:
        deployment.second(load)
    while deployment.serving == 1:
        deployment.second(load)
        assert deployment.counts[-1] <= math.ceil(load) + 1
    deployment.run(10 * start + 100, lambda _: load)
    assert deployment.backlog <= deployment.rules.target_backlog, "what gathered is worked off"
    assert max(deployment.counts) <= 3 * math.ceil(load) + 1


def test_replicas_that_never_come_are_not_asked_for_over_and_over() -> None:
    deployment = Deployment(Rules(min_replicas=1, max_replicas=1000), 10**9, serving=1)
    deployment.run(3600, lambda _: 3.5)
    assert deployment.counts[-1] == 4
    assert deployment.scaling.reason.endswith("target 2 s: 3 are starting")


@given(
    period=st.integers(300, 3000),
    mean=st.floats(0.3, 8),
    amplitude=st.floats(0.1, 1),
    noise=st.sampled_from((0.0, 0.2, 0.4)),
    start=st.integers(1, 90),
    idle=st.integers(30, 300),
    seed=st.integers(0, 99),
)
@example(period=1200, mean=3, amplitude=0.6, noise=0.4, start=60, idle=300, seed=0)
@settings(max_examples=60, deadline=None)
def test_a_load_that_swings_turns_the_count_once_per_half_period(
    period: int, mean: float, amplitude: float, noise: float, start: int, idle: int, seed: int
) -> None:
    generator = random.Random(seed)

    def load(now: int) -> float:
        swing = 1 - amplitude * math.cos(2 * math.pi * now / period)
        return mean * swing * (1 + noise * generator.uniform(-1, 1))

    deployment = Deployment(Rules(min_replicas=1, max_replicas=1000, idle_seconds=idle), start, serving=1)
    deployment.run(5 * period, load)
    turns = [turn for turn in deployment.turns() if turn > period]  # the first period is not like the others
    assert len(turns) <= 2 * 4 + 1  # the last one of the first period may be late
    for first, third in pairwise(turns[::2]):  # the same way again: a period later, but for noise
        assert third - first > 0.6 * period
    for second, fourth in pairwise(turns[1::2]):
        assert fourth - second > 0.6 * period


@given(loads=st.lists(st.floats(0, 10), min_size=5, max_size=20))
@settings(max_examples=20, deadline=None)
def test_one_goes_at_a_time_each_after_its_idle_time(loads: list[float]) -> None:
    deployment = Deployment(Rules(min_replicas=0, max_replicas=8, idle_seconds=50), 5, serving=8)
    deployment.run(150 * len(loads), lambda now: loads[(now - 1) // 150])
    last = 0
    for second, way in deployment.changes():
        if way < 0:
            assert deployment.counts[second - 1] - deployment.counts[second] == 1
            assert second - last >= 50
        last = second


def test_an_idle_deployment_sleeps_and_the_first_request_wakes_it() -> None:
    rules = Rules(min_replicas=0, max_replicas=4, idle_seconds=20)
    scaling = Scaling()
    for now in range(1000):  # a conversation that is open: it runs, and nothing is to be computed
        assert scaling.wanted(rules, Observed(now=now, serving=1, running=1, most_running=ROWS)) == 1
    wanted = [scaling.wanted(rules, Observed(now=now, serving=1)) for now in range(1000, 1202)]
    assert wanted[:200] == [1] * 200, "the last one stays ten times as long"
    assert wanted[-1] == 0
    assert scaling.wanted(rules, Observed(now=1300, serving=0)) == 0
    first = Observed(now=1300.2, serving=0, at_gateways=1, tokens_at_gateways=100, prefill_rate=RATE)
    assert scaling.wanted(rules, first) == 1
    assert scaling.reason == "1 request waits, and nothing serves"
    assert Scaling().wanted(rules, replace(first, prefill_rate=0, tokens_at_gateways=0)) == 1, "nothing is known yet"
    assert scaling.wanted(rules, replace(first, now=1301, starting=1)) == 1


@given(load=st.floats(0.1, 6), start=st.integers(1, 60))
@settings(max_examples=20, deadline=None)
def test_a_deployment_that_sleeps_meets_any_load(load: float, start: int) -> None:
    deployment = Deployment(Rules(min_replicas=0, max_replicas=100), start, serving=0)
    deployment.run(100, lambda _: 0.0)
    assert set(deployment.counts) == {0}
    deployment.run(1, lambda _: load)
    assert deployment.counts[-1] >= 1
    deployment.run(20 * start + 200, lambda _: load)
    assert deployment.backlog <= deployment.rules.target_backlog
    assert max(deployment.counts) <= 3 * math.ceil(load) + 1


def test_one_huge_prompt_is_not_a_load_for_many() -> None:
    rules, scaling = Rules(min_replicas=1, max_replicas=50, idle_seconds=20), Scaling()
    huge = Observed(now=0, serving=1, running=1, queued_tokens=10**6, prefill_rate=RATE, most_running=ROWS)
    for now in range(1000):
        assert scaling.wanted(rules, replace(huge, now=now, queued_tokens=10**6 - 1000 * now, computed=1000)) == 1
    behind = replace(huge, now=1000, waiting=3, queued_tokens=10**6 + 300, computed=1000)
    assert scaling.wanted(rules, behind) == 4, "what waits behind it can go elsewhere"
    counts = [scaling.wanted(rules, Observed(now=now, serving=4, prefill_rate=RATE)) for now in range(1001, 1200)]
    assert counts[-1] == 1


def test_a_backlog_is_shared_out_at_once() -> None:
    """Prompts of 10 s in all; one replica more starts in a second, and works off 2 s of what is beyond 2 s."""
    rules = Rules(min_replicas=1, max_replicas=50)
    seen = Observed(now=0, serving=1, start_seconds=1, running=1, waiting=99, queued_tokens=10_000, prefill_rate=RATE)
    scaling = Scaling()
    assert scaling.wanted(rules, seen) == 4, "beside the one there is"
    assert scaling.reason == "backlog of 10.0 s, target 2 s"
    assert Scaling().wanted(replace(rules, max_replicas=3), seen) == 3
    assert Scaling().wanted(rules, replace(seen, start_seconds=60)) == 1, "it is done before another could help"
    assert Scaling().wanted(rules, replace(seen, queued_tokens=2_000)) == 1


def test_where_prompts_were_never_timed_requests_are_counted() -> None:
    rules, scaling = Rules(min_replicas=1, max_replicas=50), Scaling()
    seen = Observed(now=0, serving=1, running=8, waiting=20, queued_tokens=10**6, most_running=8)
    assert scaling.wanted(rules, seen) == 4
    assert scaling.reason == "20 requests wait, and how fast prompts are computed is not measured yet"
    assert scaling.wanted(rules, replace(seen, now=1, starting=3)) == 4


def test_a_full_cache_and_full_rows_raise_and_what_starts_counts() -> None:
    rules = Rules(min_replicas=1, max_replicas=50, idle_seconds=20)
    for full in (
        Observed(now=0, serving=2, running=20, usage=0.95, prefill_rate=RATE, most_running=ROWS),
        Observed(now=0, serving=2, running=19, usage=0.3, prefill_rate=RATE, most_running=10),
    ):
        scaling = Scaling()
        assert scaling.wanted(rules, full) == 3
        assert "95% of the" in scaling.reason
        assert scaling.wanted(rules, replace(full, now=1, starting=1)) == 3
        spread = replace(full, serving=3, usage=full.usage * 2 / 3)
        assert {scaling.wanted(rules, replace(spread, now=now)) for now in range(2, 200)} == {3}, "2 would be full"
        more = replace(full, waiting=1000)
        assert Scaling().wanted(rules, more) == 4, "twice as many, before it is seen what those take"


def test_bounds_that_change_are_obeyed_at_once() -> None:
    scaling, seen = Scaling(), Observed(now=0, serving=4)
    for least, most, wanted in ((1, 9, 4), (6, 9, 6), (1, 2, 2), (0, 0, 0), (0, 9, 0), (3, 3, 3)):
        assert scaling.wanted(Rules(min_replicas=least, max_replicas=most), seen) == wanted
    assert scaling.reason == "no requests; at least 3 must be"
