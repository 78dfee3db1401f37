"""How many drafts are worth it, on machines and texts that are made up."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Protocol

import numpy as np
import pytest
from quire_engine.request import EngineSampling, Request
from quire_engine.speculation.draft import Draft
from quire_engine.speculation.value import Value

MOST = 8
OUTPUT = 300  # tokens of a request
LEARNING = 5  # plain steps' time that may be lost to find out what is never worth it


@dataclass(frozen=True)
class Machine:
    """What a step of so many tokens takes, in milliseconds, and how long it waits for the host where it cannot be
    planned before the end of the step before it."""

    cost: Callable[[int], float]
    gap: float = 0.0
    noise: float = 0.0
    outliers: float = 0.0

    def measured(self, rng: Random, seconds: float) -> float:
        seconds *= rng.uniform(1 - self.noise, 1 + self.noise)
        return seconds * 5 if rng.random() < self.outliers else seconds


def cpu(tokens: int) -> float:
    return float(np.interp(tokens, [1, 8, 64, 256, 2048], [30, 40, 170, 600, 4800]))


def gpu(tokens: int) -> float:
    return max(10.0, 10.0 * tokens / 256)


MACHINES = {
    "cpu": Machine(cpu),
    "gpu": Machine(gpu, gap=1.5),
    "flat": Machine(lambda tokens: 10.0),
    "linear": Machine(lambda tokens: 5.0 * tokens, gap=0.5),
    "steep": Machine(lambda tokens: 10 + 5.0 * tokens, gap=2.0),
}
NOISY = {
    f"{name}, noisy": Machine(machine.cost, machine.gap, noise=0.3, outliers=0.05) for name, machine in MACHINES.items()
}


@dataclass(frozen=True)
class Text:
    """The chance that a draft follows, by the request's number and its output so far; what the drafter says of it;
    how often it says anything."""

    chance: Callable[[int, int], float]
    said: Callable[[float], float] = lambda chance: 0.5
    drafted: float = 1.0


TEXTS = {
    "never": Text(lambda number, output: 0.0),
    "never, sure of it": Text(lambda number, output: 0.0, lambda chance: 0.95),
    "always": Text(lambda number, output: 1.0),
    "always, doubted": Text(lambda number, output: 1.0, lambda chance: 0.1),
    "half": Text(lambda number, output: 0.5),
    "half, overrated": Text(lambda number, output: 0.5, lambda chance: 0.95),
    "good": Text(lambda number, output: 0.8, lambda chance: 0.8),
    "good, underrated": Text(lambda number, output: 0.8, lambda chance: 0.2),
    "poor": Text(lambda number, output: 0.2, lambda chance: 0.6),
    "phases": Text(lambda number, output: 0.95 * (output // 75 % 2)),
    "two kinds": Text(lambda number, output: 0.9 * (number % 2)),
    "seldom": Text(lambda number, output: 0.9, lambda chance: 0.8, drafted=0.15),
}


class Policy(Protocol):
    def possible(self, rows: int, certain: int) -> bool: ...
    def worth_waiting(
        self, requests: list[Request], drafts: list[Draft], rows: int, certain: int, *, unknown: bool
    ) -> bool: ...
    def choose(self, requests: list[Request], drafts: list[Draft], rows: int, certain: int, room: int) -> list[int]: ...
    def compare(self, request: Request, draft: Draft, right: bool) -> None: ...
    def learn(self, request: Request, draft: Draft, computed: int, accepted: int) -> None: ...
    def timed(self, tokens: int, prompts: int, seconds: float, waited: float) -> None: ...
    def forget(self, request: Request) -> None: ...


class Fixed:
    """So many drafts for each request, whatever comes of it."""

    def __init__(self, length: int) -> None:
        self.length = length

    def possible(self, rows: int, certain: int) -> bool:
        return self.length > 0

    def worth_waiting(
        self, requests: list[Request], drafts: list[Draft], rows: int, certain: int, *, unknown: bool
    ) -> bool:
        return any(draft.tokens for draft in drafts)

    def choose(self, requests: list[Request], drafts: list[Draft], rows: int, certain: int, room: int) -> list[int]:
        return [min(self.length, len(draft.tokens)) for draft in drafts]

    def compare(self, request: Request, draft: Draft, right: bool) -> None: ...
    def learn(self, request: Request, draft: Draft, computed: int, accepted: int) -> None: ...
    def timed(self, tokens: int, prompts: int, seconds: float, waited: float) -> None: ...
    def forget(self, request: Request) -> None: ...


def a_request(number: int) -> Request:
    return Request(number, [1], 1, EngineSampling(max_tokens=OUTPUT))


def run(
    policy: Policy,
    machine: Machine,
    text: Text,
    batch: int,
    steps: int,
    prompt: int = 0,
    seed: int = 1,
    disturbed: range = range(0),
) -> tuple[float, float]:
    """How long it takes to draw as much as plain steps would in so many, and the second half of it, by what steps take
    without the noise. A request that ends makes room for the next; its prompt, of so many tokens, comes meanwhile
    in pieces of 256. `disturbed`: steps beside which something else runs."""
    rng = Random(seed)
    requests = [a_request(number) for number in range(batch)]
    outputs = {request.id: rng.randrange(OUTPUT) for request in requests}
    number = batch
    queued, drafted = 0.0, False
    time = half = 0.0
    drawn, wanted, made = 0, steps * batch, 0

    def seen(request: Request, most: int) -> Draft:
        said = text.said(text.chance(request.id, outputs[request.id]))
        return Draft([1] * most, [said] * most) if rng.random() < text.drafted else Draft()

    while drawn < wanted:
        prompts = 256 if queued >= 256 and not drafted else 0
        queued -= prompts
        counts = [0] * batch
        drafts = [Draft()] * batch
        waited = drafted
        if not prompts and policy.possible(batch, batch):
            if not drafted:  # a step is in flight
                drafts = [seen(request, MOST + 1) for request in requests]
                waited = policy.worth_waiting(requests, drafts, batch, batch, unknown=True)
            for place, (request, draft) in enumerate(zip(requests, drafts, strict=True)):
                right = rng.random() < text.chance(request.id, outputs[request.id])
                if drafted:
                    drafts[place] = seen(request, MOST)
                elif draft.tokens:
                    policy.compare(request, draft, right)
                    drafts[place] = Draft(draft.tokens[1:], draft.chances[1:]) if right else Draft()
            if waited:
                counts = policy.choose(requests, drafts, batch, batch, 1000)
        drafted = any(counts)
        alone = machine.gap if waited else 0.0
        seconds = machine.cost(batch + prompts + sum(counts)) + alone
        time += seconds
        if drawn < wanted / 2:
            half = time
        for place, (request, count, draft) in enumerate(zip(list(requests), counts, drafts, strict=True)):
            accepted = 0
            if count:
                chance = text.chance(request.id, outputs[request.id])
                while accepted < count and rng.random() < chance:
                    accepted += 1
                policy.learn(request, draft, count, accepted)
            outputs[request.id] += accepted + 1
            drawn += accepted + 1
            queued += (accepted + 1) * prompt / OUTPUT
            if outputs[request.id] >= OUTPUT:
                policy.forget(request)
                requests[place] = a_request(number)
                outputs[number] = 0
                number += 1
        held_up = machine.measured(rng, 0.7 * alone)  # the rest is not seen
        took = machine.measured(rng, seconds - 0.7 * alone) + held_up
        if made in disturbed:
            took *= rng.uniform(1, 6)
        made += 1
        policy.timed(batch + prompts + sum(counts), prompts, took, held_up)
    return time, time - half


@pytest.mark.parametrize(
    ("batch", "prompt"),
    [
        (1, 0),
        (16, 300),
        *(pytest.param(batch, prompt, marks=pytest.mark.slow) for batch in (1, 4, 16, 64) for prompt in (0, 300)),
    ],
)
@pytest.mark.parametrize("machine", MACHINES | NOISY)
def test_never_slower(machine: str, batch: int, prompt: int) -> None:
    made = (MACHINES | NOISY)[machine]
    for name, text in TEXTS.items():
        plain, _ = run(Fixed(0), made, text, batch, 800, prompt)
        took, _ = run(Value(MOST), made, text, batch, 800, prompt)
        assert took <= plain / 0.97 + LEARNING * made.cost(batch), name


@pytest.mark.parametrize("text", ["always", "always, doubted", "good", "good, underrated", "two kinds"])
@pytest.mark.parametrize("machine", MACHINES | NOISY)
def test_near_the_best_length(machine: str, text: str) -> None:
    """Once it has learnt what steps take and what drafts are worth."""
    made = (MACHINES | NOISY)[machine]
    best = min(run(Fixed(length), made, TEXTS[text], 4, 2400)[1] for length in (0, 1, 2, 4, 8))
    assert run(Value(MOST), made, TEXTS[text], 4, 2400)[1] <= best / 0.9


@pytest.mark.parametrize("disturbed", [range(40), range(20, 100), range(1000, 1100)])
@pytest.mark.parametrize("batch", [1, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("machine", MACHINES)
def test_what_a_disturbance_has_taught_is_soon_forgotten(machine: str, batch: int, disturbed: range) -> None:
    made = MACHINES[machine]
    for text in ("always", "good", "never, sure of it"):
        best = min(run(Fixed(length), made, TEXTS[text], batch, 2400)[1] for length in (0, 1, 2, 4, 8))
        took = run(Value(MOST), made, TEXTS[text], batch, 2400, disturbed=disturbed)[1]
        assert took <= best / 0.87, text


def test_one_long_halt_between_two_steps_is_forgotten() -> None:
    """A machine that slept, say, while a step waited for drafts."""
    value, request = Value(MOST), a_request(1)
    for halt in (*[0.0] * 20, 60.0, *[0.0] * 20):
        drafts = [Draft([1] * MOST, [0.9] * MOST)]
        counts = value.choose([request], drafts, 1, 1, MOST) if value.possible(1, 1) else [0]
        if counts[0]:
            value.learn(request, drafts[0], counts[0], counts[0])
        waited = (0.001 if counts[0] else 0.0) + halt
        value.timed(1 + counts[0], 0, 0.03 + 0.001 * counts[0] + waited, waited)
    assert value.costs.gap < 0.03
    assert value.possible(1, 1)
    assert value.worth_waiting([request], [Draft([1] * MOST, [0.9] * MOST)], 1, 1, unknown=True)
