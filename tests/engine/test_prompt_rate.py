"""How fast an engine takes its prompts to be computed, over a device whose speed is known."""

from collections import deque
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from drafters import Constant, Everything
from quire_engine.config import SchedulerLimits, SpeculativeConfig
from quire_engine.engine import Engine, PromptRate
from quire_engine.request import EngineSampling, Request
from quire_engine.speculation.speculation import Speculation
from quire_engine.step import StepPlan, StepResult

SPEED = 1000.0  # tokens per second
DECODE = 7.0  # seconds that a step without prompts takes


class Device:
    """Computes one step after the other, on a clock that stands still while the host works."""

    def __init__(self, depth: int) -> None:
        self.limits = SchedulerLimits(
            vocab_size=300,
            num_pages=1000,
            block_size=16,
            max_model_len=8000,
            max_num_seqs=4,
            max_num_batched_tokens=256,
            max_num_queued_reqs=100,
            steps_in_flight=depth,
        )
        self.now = 100.0
        self._free = 0.0
        self._steps: deque[tuple[float, StepPlan]] = deque()

    def submit(self, plan: StepPlan) -> None:
        decodes = plan.counts.max() == 1
        self._free = max(self._free, self.now) + (DECODE if decodes else len(plan.token_ids) / SPEED)
        self._steps.append((self._free, plan))

    def collect(self) -> StepResult:
        done, plan = self._steps.popleft()
        self.now = max(self.now, done)
        return StepResult(np.full(int(plan.draws.sum()), 5, np.int32))

    def close(self) -> None: ...


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_prompts_are_timed_and_decoding_is_not(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor the time in which nothing was to be done."""
    device = Device(depth)
    monkeypatch.setattr("quire_engine.engine.time", SimpleNamespace(monotonic=lambda: device.now))
    engine = Engine(device)
    assert engine.prompt_rate.per_second == 0.0
    for number in range(6):
        device.now += 1000.0
        engine.add(Request(number, [5] * 700, 700, EngineSampling(max_tokens=3), cache_salt=bytes([number])))
        while engine.has_work:
            engine.step()
        assert engine.prompt_rate.per_second == pytest.approx(SPEED)
    for number in range(6, 12):  # several at once, whose decoding shares steps with the next one's prompt
        engine.add(Request(number, [5] * 700, 700, EngineSampling(max_tokens=3), cache_salt=bytes([number])))
    while engine.has_work:
        engine.step()
    assert 0.9 * SPEED < engine.prompt_rate.per_second < SPEED


class Timed(Everything):
    """In place of `Value`: all drafts, and what it is told of time."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[float, float]] = []

    def timed(self, tokens: int, prompts: int, seconds: float, waited: float) -> None:
        self.seen.append((seconds, waited))


@pytest.mark.parametrize("ending", ["length", "abort"])
def test_the_time_between_two_requests_is_no_step_s(ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the first ended: drafts would seem to cost all of it."""
    device, value = Device(2), Timed()
    device.limits = replace(device.limits, speculation=SpeculativeConfig(method="suffix"))
    monkeypatch.setattr("quire_engine.engine.time", SimpleNamespace(monotonic=lambda: device.now))
    engine = Engine(device, Speculation(Constant(), value, 4))
    for number in range(3):
        engine.add(Request(number, [5] * 9, 9, EngineSampling(max_tokens=60)))
        for _ in range(8):
            engine.step()
        assert not engine.scheduler.num_in_flight, "a step without drafts would be told of as well"
        if ending == "abort":
            engine.abort(number)
        while engine.has_work:
            engine.step()
        device.now += 1000.0
    assert len(value.seen) >= 12
    assert max(seconds for seconds, _ in value.seen) <= DECODE
    assert max(waited for _, waited in value.seen) == 0.0


def test_a_full_step_says_more_than_many_small_ones() -> None:
    rate = PromptRate(1000)
    for _ in range(100):
        rate.take(2, 0.01)
    assert rate.per_second == pytest.approx(200.0)
    for _ in range(10):
        rate.take(1000, 0.1)
    assert 9000 < rate.per_second < 10_000
    for _ in range(100):
        rate.take(2, 0.01)
    assert rate.per_second > 8000
