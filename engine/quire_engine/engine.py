"""The engine: requests in, tokens out, one step at a time."""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, Protocol

from quire_engine.config import SchedulerLimits
from quire_engine.errors import EngineFailure, QuireError
from quire_engine.outcome import StepOutcome
from quire_engine.request import Request, State
from quire_engine.scheduler import Scheduler
from quire_engine.speculation.choice import speculation_of
from quire_engine.speculation.speculation import Speculation
from quire_engine.step import StepPlan, StepResult

_PAUSE = 0.002  # seconds


class Executor(Protocol):
    """Whatever computes a plan: a model runner in this process, or workers behind a channel."""

    limits: SchedulerLimits

    def submit(self, plan: StepPlan) -> None:
        """Starts a step; `limits.steps_in_flight` may be on their way at once."""

    def collect(self) -> StepResult:
        """The result of the oldest step that was submitted and not collected."""

    def prepare(self, guidance: str) -> "Future[Any]":
        """Compiles what a request's output has to look like, where tokens are drawn. The future raises
        InvalidParameter for what cannot be compiled. It may be cancelled by whoever waits for it alone."""

    def close(self) -> None: ...


class PromptRate:
    """How fast prompts are computed. A step counts by its prompt tokens: what many short prompts beside much decoding
    take says little about a long queue."""

    def __init__(self, most_tokens: int) -> None:
        """`most_tokens`: of a step."""
        self.per_second = 0.0  # 0: not measured yet
        self._memory = 4.0 * most_tokens

    def take(self, tokens: int, seconds: float) -> None:
        """A step computed so many prompt tokens in that time."""
        if tokens and seconds > 0:
            share = tokens / self._memory if self.per_second else 1.0
            self.per_second += share * (tokens / seconds - self.per_second)


class Engine:
    """One continuous-batching engine. Not thread-safe: one thread adds, aborts and steps."""

    def __init__(self, executor: Executor, speculation: Speculation | None = None) -> None:
        """`speculation`: in place of the one that the executor's limits ask for."""
        self._executor = executor
        self.scheduler = Scheduler(executor.limits, speculation or speculation_of(executor.limits))
        self.steps = 0  # liveness is the progress of this counter
        self.prompt_rate = PromptRate(executor.limits.most_tokens)
        self._begun: deque[tuple[float, float]] = deque()  # when the steps in flight were, and how long nothing was
        self._collected = 0.0  # when one was last; 0: there was nothing to do since
        self._preparing: dict[int, Future[Any]] = {}  # by the request that waits for it

    def add(self, request: Request) -> None:
        """Accepts a request; raises what `Scheduler.add` raises."""
        self.scheduler.add(request)
        if request.state is State.PREPARING:
            self._preparing[request.id] = self._executor.prepare(request.params.guidance)

    def abort(self, request_id: int) -> None:
        """Ends a request early. Its grammar is not compiled any more where that has not begun and no other waits for
        it: else clients that leave would have those that stay wait."""
        prepared = self._preparing.pop(request_id, None)
        if prepared is not None and prepared not in self._preparing.values():
            prepared.cancel()
        self.scheduler.abort(request_id)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything, if only to wait for what is being compiled."""
        return self.scheduler.has_work or bool(self._preparing)

    def step(self, on_start: Callable[[list[Request]], None] | None = None) -> StepOutcome:
        """Schedule and submit one step; collect and commit the oldest, unless there is room for another in flight.

        `on_start` is told of what the step takes in for the first time before it is submitted, instead of its outcome.
        """
        scheduler = self.scheduler
        if self._preparing:
            self._take_prepared()
        plan = scheduler.schedule(time.monotonic())
        if on_start is not None and (started := scheduler.take_started()):
            on_start(started)
        if plan is not None:
            begun = time.monotonic()
            waited = begun - self._collected if self._collected and not self._begun else 0.0
            self._begun.append((begun, waited))
            self._executor.submit(plan)
        elif scheduler.running and not scheduler.num_in_flight:  # for an image that is on its way
            time.sleep(_PAUSE)
        self.steps += 1
        in_flight = scheduler.num_in_flight
        due = in_flight and (plan is None or in_flight >= scheduler.limits.steps_in_flight)
        if not due:
            outcome = scheduler.commit(None)
            if not scheduler.has_work:  # the last one was aborted
                self._collected = 0.0
            return outcome
        result = self._executor.collect()
        begun, waited = self._begun.popleft()
        begun, self._collected = max(begun, self._collected), time.monotonic()
        seconds = self._collected - begun
        outcome = scheduler.commit(result)
        self.prompt_rate.take(outcome.num_prompt_tokens, seconds)
        if scheduler.speculation is not None:
            waited = waited if scheduler.limits.steps_in_flight > 1 else 0.0
            scheduler.speculation.timed(outcome.num_tokens, outcome.num_prompt_tokens, seconds + waited, waited)
        if not scheduler.has_work:
            self._collected = 0.0
        return outcome

    def _take_prepared(self) -> None:
        """Grammars that are compiled let their requests in. Waits a moment where there is nothing else to do."""
        if not self.scheduler.has_work:
            wait(self._preparing.values(), timeout=_PAUSE, return_when=FIRST_COMPLETED)
        for request_id, future in list(self._preparing.items()):
            if future.done():
                del self._preparing[request_id]
                self.scheduler.prepared(request_id, _refusal(future))

    def close(self) -> None:
        """Stops the workers."""
        self._executor.close()


def _refusal(prepared: "Future[Any]") -> QuireError | None:
    error = prepared.exception()
    if error is None or isinstance(error, QuireError):
        return error
    return EngineFailure(f"a grammar could not be compiled: {type(error).__name__}")
