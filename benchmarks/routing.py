"""Routing by prefixes beside round robin and least loaded: conversations that share a few system prompts, and grow.

    python benchmarks/routing.py simulated     four replicas: the engine's scheduler and cache, in made-up time
    python benchmarks/routing.py real          `quire serve -dp 2` with the demo model and a cache that is too small
    python benchmarks/routing.py decision      what a decision takes at 4, 64 and 1000 replicas

A conversation sends its next turn a while after its last answer came: the same traffic for every policy, which differ
in how long it waits. Decoding is greedy; where answers differ between policies nothing is reported.
"""

import argparse
import asyncio
import contextlib
import heapq
import itertools
import json
import random
import re
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from quire_cluster.policies.prefixes import Prompt
from quire_cluster.policies.routing import ReplicaLoad, Router, Unreported, choose_replica
from quire_engine.config import SchedulerLimits
from quire_engine.request import EngineSampling, Request
from quire_engine.scheduler import Scheduler
from quire_engine.step import StepResult

BLOCK = 16
REPORT = 0.25  # seconds between a replica's reports


class LeastLoaded(Router[Any]):
    """What it was before."""

    def __init__(self, generator: random.Random) -> None:
        super().__init__(generator)
        self._loads: dict[Any, ReplicaLoad] = {}
        self._sent = itertools.count()

    def update(self, key: Any, load: ReplicaLoad | None) -> None:
        """As the router's."""
        super().update(key, load)
        self._loads.pop(key, None)
        if load is not None:
            self._loads[key] = load

    def choose(self, prompt: Prompt, beside: Any = None) -> Any:
        """Whatever the prompt is."""
        return choose_replica(self._loads, next(self._sent))


class RoundRobin(LeastLoaded):
    """Whatever the load is, too."""

    def choose(self, prompt: Prompt, beside: Any = None) -> Any:
        """The next."""
        return sorted(self._loads)[next(self._sent) % len(self._loads)] if self._loads else None


POLICIES: dict[str, Callable[[random.Random], Router[Any]]] = {
    "round robin": RoundRobin,
    "least loaded": LeastLoaded,
    "prefixes": Router,
}


@dataclass(frozen=True)
class Traffic:
    """Conversations; lengths in tokens, times in seconds."""

    conversations: int
    systems: int
    turns: int
    system_tokens: int
    user_tokens: int
    output_tokens: int
    think: float  # between an answer and the next turn, on average
    ramp: float  # within which they begin

    def conversation(self, number: int) -> "Conversation":
        """The same for every policy."""
        generator = random.Random(number)

        def said(count: int, of: random.Random = generator) -> list[int]:
            return [of.randrange(100, 40000) for _ in range(count)]

        return Conversation(
            begins=generator.uniform(0, self.ramp),
            system=said(self.system_tokens, random.Random(-1 - number % self.systems)),
            turns=[
                said(generator.randrange(self.user_tokens // 2, self.user_tokens * 3 // 2)) for _ in range(self.turns)
            ],
            pauses=[generator.expovariate(1 / self.think) for _ in range(self.turns)],
        )


@dataclass
class Conversation:
    """What its user says, and when."""

    begins: float
    system: list[int]
    turns: list[list[int]]
    pauses: list[float]


@dataclass
class Found:
    """Of one policy."""

    first: list[float] = field(default_factory=list)  # seconds to each first token
    prompt_tokens: int = 0
    cached_tokens: int = 0
    answers: dict[tuple[int, int], list[int]] = field(default_factory=dict)  # by conversation and turn
    note: str = ""

    @property
    def cached(self) -> float:
        """Share of the prompt tokens."""
        return self.cached_tokens / self.prompt_tokens


# ---- simulated --------------------------------------------------------------------------------------------------

SIMULATED = Traffic(160, 4, 8, 400, 150, 200, think=10.0, ramp=60.0)
REPLICAS, PAGES = 4, (3000, 5000)  # pages of one; all hold 43 % of what is said in the end, or 71 %
STEP, RATE = 0.015, 6000.0  # seconds of a step without tokens; tokens per second that come on top


class SimulatedReplica:
    """The engine's scheduler and cache; a step takes as long as its tokens say. The next token is a fixed one."""

    def __init__(self, pages: int) -> None:
        limits = SchedulerLimits(
            vocab_size=1 << 20,
            num_pages=pages,
            block_size=BLOCK,
            max_model_len=8192,
            max_num_seqs=128,
            max_num_batched_tokens=2048,
            max_num_queued_reqs=4096,
        )
        self.scheduler = Scheduler(limits)
        self.unreported = Unreported()
        self.queued = 0  # as it last said
        self.running = False
        self.busy = 0.0  # seconds

    def report(self) -> None:
        """What the gateway hears now and then."""
        requests = self.scheduler.requests.values()
        self.queued = sum(len(request.tokens) - request.num_computed for request in requests)
        self.unreported.reported()

    def load(self) -> ReplicaLoad:
        """As its gateway sees it."""
        queued = self.queued + self.unreported.tokens
        return ReplicaLoad(
            own=len(self.scheduler.requests), queued=queued, pages=self.scheduler.pool.num_pages, most=4096
        )


def simulate(policy: Callable[[random.Random], Router[Any]], traffic: Traffic, pages: int) -> Found:
    """Discrete events: a turn arrives, a step ends, replicas report."""
    router = policy(random.Random(0))
    router.block_size = BLOCK
    replicas = [SimulatedReplica(pages) for _ in range(REPLICAS)]
    for number, replica in enumerate(replicas):
        router.update(number, replica.load())
    conversations = [traffic.conversation(number) for number in range(traffic.conversations)]
    logs = [list(one.system) for one in conversations]
    turn_of = [0] * len(conversations)
    found, ids = Found(), itertools.count()
    live: dict[int, tuple[int, float, Prompt, int]] = {}  # request → conversation, arrival, and what routing believed
    order = itertools.count()
    events: list[tuple[float, int, str, int]] = []

    def at(when: float, what: str, number: int) -> None:
        heapq.heappush(events, (when, next(order), what, number))

    def step(number: int, now: float) -> None:
        replica = replicas[number]
        plan = replica.scheduler.schedule(now)
        replica.running = plan is not None
        if plan is None:
            return
        for request in replica.scheduler.take_started():
            _, _, prompt, believed = live[request.id]
            router.started(number, prompt, believed, request.num_cached)
            found.cached_tokens += request.num_cached
        seconds = STEP + len(plan.token_ids) / RATE
        replica.busy += seconds
        draws = int(plan.draws.sum())
        at(now + seconds, "step", number | draws << 8)

    for number, one in enumerate(conversations):
        at(one.begins, "turn", number)
    at(0.0, "report", 0)
    now = 0.0
    while events:
        now, _, what, number = heapq.heappop(events)
        if what == "turn":
            logs[number] += conversations[number].turns[turn_of[number]]
            prompt = Prompt.of(logs[number], b"", BLOCK)
            key = router.choose(prompt)
            believed = router.sent(key, prompt)
            params = EngineSampling(temperature=0.0, max_tokens=traffic.output_tokens)
            request = Request(next(ids), list(logs[number]), len(logs[number]), params, arrival=now)
            live[request.id] = (number, now, prompt, believed)
            replica = replicas[key]
            replica.scheduler.add(request)
            replica.unreported.sent(request.id, prompt.tokens - believed)
            replica.unreported.admitted(request.id)
            router.update(key, replica.load())
            found.prompt_tokens += prompt.tokens
            if not replica.running:
                step(key, now)
        elif what == "step":
            number, draws = number & 255, number >> 8
            outcome = replicas[number].scheduler.commit(StepResult(np.full(draws, 7, np.int32)))
            for request in outcome.requests:
                if request.num_output == 1:
                    found.first.append(now - live[request.id][1])
            for request in outcome.finished:
                talk, *_ = live.pop(request.id)
                found.answers[talk, turn_of[talk]] = request.tokens[request.num_prompt :]
                logs[talk] = list(request.tokens)
                turn_of[talk] += 1
                if turn_of[talk] < traffic.turns:
                    at(now + conversations[talk].pauses[turn_of[talk]], "turn", talk)
                router.update(number, replicas[number].load())
            step(number, now)
        elif events:
            for number, replica in enumerate(replicas):
                replica.report()
                router.update(number, replica.load())
            at(now + REPORT, "report", 0)
    shares = "/".join(f"{replica.busy / now:.0%}" for replica in replicas)
    found.note = f"busy {shares}"
    return found


def simulate_by_name(name: str, pages: int) -> Found:
    """With the traffic that the figures are of."""
    return simulate(POLICIES[name], SIMULATED, pages)


# ---- real -------------------------------------------------------------------------------------------------------

REAL = Traffic(14, 2, 7, 160, 48, 16, think=5.0, ramp=15.0)
CACHE = 110 << 20  # bytes of a replica: about 2,500 tokens; all conversations come to 6,000 in the end


@contextlib.contextmanager
def serving(policy: str) -> Iterator[tuple[str, str]]:
    """`quire serve` whose gateway has that policy; its HTTP and its gRPC address."""
    command = [sys.executable, __file__, "serve", "--policy", policy]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert server.stdout is not None
    http = ""
    try:
        for line in server.stdout:
            if found := re.search(r"OpenAI API +(http://\S+)/v1", line):
                http = found[1]
            elif http and (found := re.search(r"gRPC +(\S+)", line)):
                yield http, found[1]
                return
        raise RuntimeError("the server ended; see `quire serve -dp 2`")
    finally:
        server.terminate()
        server.wait()


def serve(policy: str) -> None:
    """In this process. The product has no option for it: the name that a dispatcher looks up is another class."""
    from quire.cli.main import main

    options = ["--data-parallel-size", "2", "--kv-cache-memory-bytes", str(CACHE), "--max-model-len", "2048"]
    with mock.patch("quire_cluster.gateway.dispatcher.Router", POLICIES[policy]):
        sys.exit(main(["serve", *options, "--deterministic", "--port", "0", "--grpc-port", "0"]))


def cached_and_all(url: str) -> tuple[int, int]:
    """Prompt tokens so far."""
    text = urllib.request.urlopen(f"{url}/metrics").read().decode()
    cached, total = (
        re.search(rf"^quire:{name}_total\S* (\S+)", text, re.MULTILINE)
        for name in ("prompt_tokens_cached", "prompt_tokens")
    )
    assert cached is not None and total is not None
    return int(float(cached[1])), int(float(total[1]))


async def drive(address: str, traffic: Traffic) -> Found:
    """The conversations over gRPC."""
    from quire import AsyncClient

    found, client = Found(), AsyncClient(address)

    async def ask(prompt: list[int], count: int) -> tuple[float, list[int]]:
        begun, first, answer = time.perf_counter(), 0.0, []
        async for piece in client.stream(prompt, max_tokens=count, temperature=0.0, ignore_eos=True):
            if piece.token_ids and not answer:
                first = time.perf_counter() - begun
            answer += piece.token_ids
        return first, answer

    async def talk(number: int) -> None:
        one = traffic.conversation(number)
        log = list(one.system)
        await asyncio.sleep(one.begins)
        for turn, said in enumerate(one.turns):
            if turn:
                await asyncio.sleep(one.pauses[turn])
            log += said
            first, answer = await ask(log, traffic.output_tokens)
            found.first.append(first)
            found.answers[number, turn] = answer
            log += answer

    for at in range(4):  # both replicas have computed something before it counts
        await ask([50 + at] * 8, 4)
    begun = time.perf_counter()
    await asyncio.gather(*(talk(number) for number in range(traffic.conversations)))
    found.note = f"{time.perf_counter() - begun:.0f} s in all"
    await client.close()
    return found


def measure(policy: str) -> Found:
    """With servers of its own."""
    with serving(policy) as (http, grpc):
        before = cached_and_all(http)
        found = asyncio.run(drive(grpc, REAL))
        after = cached_and_all(http)
        found.cached_tokens, found.prompt_tokens = after[0] - before[0], after[1] - before[1]
    return found


# ---- decision ---------------------------------------------------------------------------------------------------


def decide(count: int, tokens: int = 4096) -> dict[str, float]:
    """Median seconds, for a prompt whose first quarter a third of the replicas have, and all of it one."""
    generator = random.Random(0)
    router: Router[int] = Router(generator)
    router.block_size = BLOCK
    said = [generator.randrange(100_000) for _ in range(tokens)]
    prompt = Prompt.of(said, b"", BLOCK)
    loads = [ReplicaLoad(own=generator.randrange(20), queued=generator.randrange(2000)) for _ in range(count)]
    for key in range(count):
        router.update(key, loads[key])
        if key % 3 == 0:
            router.sent(key, Prompt(tokens // 4, prompt.hashes[: len(prompt.hashes) // 4]))
    router.sent(count // 2, prompt)

    def median(act: Callable[[], object]) -> float:
        times = []
        for _ in range(2000):
            begun = time.perf_counter()
            act()
            times.append(time.perf_counter() - begun)
        return statistics.median(times)

    return {
        "hash": median(lambda: Prompt.of(said, b"", BLOCK)),
        "choose": median(lambda: router.choose(prompt)),
        "learn": median(lambda: router.sent(count // 2, prompt)),
        "update": median(lambda: router.update(0, loads[0])),
    }


# ---- what it prints ---------------------------------------------------------------------------------------------


def compare(run: Callable[[str], Found]) -> dict[str, Any]:
    """A line for each policy, and the ratios. Raises where answers differ."""
    results: dict[str, Found] = {}
    for name in POLICIES:
        found = results[name] = run(name)
        first = sorted(found.first)
        print(
            f"{name:<14}{len(first):5d} turns  {found.cached:6.1%} of {found.prompt_tokens} prompt tokens cached  "
            f"first token after {statistics.mean(first) * 1e3:6.0f} ms (p90 {first[len(first) * 9 // 10] * 1e3:6.0f})  "
            f"{found.note}",
            flush=True,
        )
    ours = results["prefixes"]
    for name, found in results.items():
        if found.answers != ours.answers:
            differing = [key for key, answer in found.answers.items() if answer != ours.answers.get(key)]
            raise SystemExit(f"answers differ between prefixes and {name} (conversation, turn): {differing[:5]}")
    figures = {}
    for name, found in results.items():
        hits = ours.cached / found.cached if found.cached else float("inf")
        wait = statistics.mean(ours.first) / statistics.mean(found.first)
        figures[name] = {
            "cached": found.cached,
            "first_token_mean": statistics.mean(found.first),
            "hits_ratio": hits,
            "first_token_ratio": wait,
        }
        if found is not ours:
            print(f"prefixes over {name}: {hits:.2f} times the tokens cached, {wait:.2f} of the time to a first token")
    return figures


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Routing by prefixes beside round robin and least loaded.")
    parser.add_argument("part", choices=["simulated", "real", "decision", "serve"])
    parser.add_argument("--policy", choices=sorted(POLICIES), help="of serve, which is what `real` starts")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    if arguments.part == "serve":
        serve(arguments.policy)
    elif arguments.part == "simulated":
        for pages in PAGES:
            print(f"{REPLICAS} replicas with {pages * BLOCK} tokens of cache each")
            figures[str(pages)] = compare(partial(simulate_by_name, pages=pages))
    elif arguments.part == "real":
        figures = compare(measure)
    else:
        for count in (4, 64, 1000):
            figures[str(count)] = parts = decide(count)
            shown = ", ".join(f"{name} {seconds * 1e6:.1f}" for name, seconds in parts.items())
            print(f"{count:5d} replicas, a prompt of 4096 tokens, µs: {shown}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
