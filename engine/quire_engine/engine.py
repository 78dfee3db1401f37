"""The engine: requests in, tokens out, one step at a time."""

import time
from collections.abc import Callable
from typing import Protocol

from quire_engine.config import SchedulerLimits
from quire_engine.outcome import StepOutcome
from quire_engine.request import Request
from quire_engine.scheduler import Scheduler
from quire_engine.step import StepPlan, StepResult


class Executor(Protocol):
    """Whatever computes a plan: a model runner in this process, or workers behind a channel."""

    limits: SchedulerLimits

    def submit(self, plan: StepPlan) -> None:
        """Starts a step; `limits.steps_in_flight` may be on their way at once."""

    def collect(self) -> StepResult:
        """The result of the oldest step that was submitted and not collected."""

    def close(self) -> None: ...


class Engine:
    """One continuous-batching engine. Not thread-safe: one thread adds, aborts and steps."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.scheduler = Scheduler(executor.limits)
        self.steps = 0  # liveness is the progress of this counter

    def add(self, request: Request) -> None:
        """Accepts a request; raises what `Scheduler.add` raises."""
        self.scheduler.add(request)

    def abort(self, request_id: int) -> None:
        """Ends a request early."""
        self.scheduler.abort(request_id)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self.scheduler.has_work

    def step(self, on_start: Callable[[list[Request]], None] | None = None) -> StepOutcome:
        """Schedule and submit one step; collect and commit the oldest, unless there is room for another in flight.

        `on_start` is told of what the step takes in for the first time before it is submitted, instead of its outcome.
        """
        scheduler = self.scheduler
        plan = scheduler.schedule(time.monotonic())
        if on_start is not None and (started := scheduler.take_started()):
            on_start(started)
        if plan is not None:
            self._executor.submit(plan)
        self.steps += 1
        in_flight = scheduler.num_in_flight
        due = in_flight and (plan is None or in_flight >= scheduler.limits.steps_in_flight)
        return scheduler.commit(self._executor.collect() if due else None)

    def close(self) -> None:
        """Stops the workers."""
        self._executor.close()
