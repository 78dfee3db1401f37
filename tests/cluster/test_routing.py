"""Routing by prefixes and load: the map of what is cached where, the choice, and the gateway that makes it."""

import asyncio
import random
import sys
import tracemalloc
from collections import Counter
from functools import partial
from types import FrameType
from typing import Any

import pytest
from gateways import SHORT, expected, gateway, tokens, until
from hypothesis import given, settings
from hypothesis import strategies as st
from quire_cluster.policies.prefixes import PrefixMap, Prompt, bits
from quire_cluster.policies.routing import ReplicaLoad, Router, Unreported
from quire_engine.text.tokenizer import Tokenizer

BLOCK = 4


def prompt(*tokens: int, salt: bytes = b"") -> Prompt:
    return Prompt.of(list(tokens), salt, BLOCK)


def random_prompt(generator: random.Random, count: int = 64) -> list[int]:
    return [generator.randrange(1 << 31) for _ in range(count)]


# ---- blocks -----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), max_size=20), st.lists(st.integers(0, 3), max_size=20), st.integers(1, 5))
def test_hashes_are_the_same_as_far_as_prompts_are(one: list[int], other: list[int], block: int) -> None:
    ours, theirs = Prompt.of(one, b"", block), Prompt.of(other, b"", block)
    assert len(ours.hashes) == len(one) // block
    for count, (a, b) in enumerate(zip(ours.hashes, theirs.hashes, strict=False), 1):
        assert (a == b) == (one[: count * block] == other[: count * block])
    salted = Prompt.of(one, b"salt", block)
    assert not set(salted.hashes) & set(ours.hashes), "tenants share nothing"


def test_no_block_size_no_blocks() -> None:
    assert Prompt.of([1, 2, 3], b"", 0) == Prompt(3, [])


class Caches:
    """The map, said plainly: of each replica a list of hashes, the oldest first."""

    def __init__(self, share: int) -> None:
        self.share = share
        self.blocks: dict[int, list[int]] = {}

    def learn(self, replica: int, hashes: list[int], most: int) -> int:
        blocks = self.blocks[replica]
        known = len(set(blocks) & set(hashes))
        kept = [block for block in blocks if block not in hashes] + hashes[::-1]
        self.blocks[replica] = kept[-min(self.share, most or self.share) :]
        return known

    def depth(self, replica: int, hashes: list[int]) -> int:
        depth = 0
        while depth < len(hashes) and hashes[depth] in self.blocks[replica]:
            depth += 1
        return depth


@given(st.data())
def test_the_map_is_an_lru_of_each_replica(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 4))
    real, plain = PrefixMap(count * 6 * 400), Caches(6)
    for replica in range(count):
        real.add(replica)
        plain.blocks[replica] = []
    prompts = st.lists(st.integers(0, 1), min_size=1, max_size=5).map(lambda path: chained(path))
    for _ in range(data.draw(st.integers(1, 20))):
        replica, hashes = data.draw(st.integers(0, count - 1)), data.draw(prompts)
        match data.draw(st.sampled_from(["learn", "learn", "learn", "shrink", "forget"])):
            case "learn":
                most = data.draw(st.sampled_from([0, 3, 9]))
                assert real.learn(replica, hashes, most) == plain.learn(replica, hashes, most)
            case "shrink":
                real.shrink(replica, 2)
                plain.blocks[replica] = plain.blocks[replica][2:]
            case _:
                real.forget(replica)
                real.add(replica)
                plain.blocks[replica] = []
        asked, among = data.draw(prompts), data.draw(st.integers(1, 2**count - 1))
        found = real.found(asked, among)
        assert [depth for depth, _ in found] == sorted({depth for depth, _ in found}, reverse=True)
        told = {number: depth for depth, mask in found for number in bits(mask)}
        assert told == {number: plain.depth(number, asked) for number in bits(among)}
        assert len(real) == sum(map(len, plain.blocks.values()))


def chained(path: list[int]) -> list[int]:
    return list(Prompt.of(path, b"", 1).hashes)


@pytest.mark.parametrize("count", [1, 3, 1000])
def test_the_map_stays_within_its_bytes(count: int) -> None:
    """Whatever is sent, the same prompt to many replicas among it."""
    most = 4 << 20
    generator = random.Random(0)
    tracemalloc.start()
    try:
        begun = tracemalloc.get_traced_memory()[0]
        prefixes = PrefixMap(most)
        for replica in range(count):
            prefixes.add(replica)
        for _ in range(1500):
            hashes = [generator.getrandbits(62) for _ in range(16)]
            for replica in generator.sample(range(count), min(count, generator.randrange(1, 4))):
                prefixes.learn(replica, hashes, 0)
        empty = 500 * count  # bytes of replicas of which nothing is believed
        assert tracemalloc.get_traced_memory()[0] - begun < most + empty
        assert len(prefixes) > most / 400 / 2, "and it uses what it may"
    finally:
        tracemalloc.stop()


# ---- the choice -------------------------------------------------------------------------------------------------


class Cluster:
    """Replicas as one gateway sees them, and the router that is told all of it."""

    def __init__(self, count: int, seed: int = 0) -> None:
        self.router: Router[int] = Router(random.Random(seed))
        self.router.block_size = BLOCK
        self.running = dict.fromkeys(range(count), 0)
        self.queued = dict.fromkeys(range(count), 0)
        self.most = dict.fromkeys(range(count), 0)
        self.closed: set[int] = set()
        for key in self.running:
            self.show(key)

    @property
    def open(self) -> list[int]:
        return [key for key in self.running if key not in self.closed]

    def show(self, key: int) -> None:
        load = ReplicaLoad(own=self.running[key], queued=self.queued[key], most=self.most[key])
        self.router.update(key, None if key in self.closed else load)

    def send(self, asked: Prompt, beside: int | None = None) -> int | None:
        key = self.router.choose(asked, beside)
        if key is not None:
            self.router.sent(key, asked)
            self.running[key] += 1
            self.show(key)
        return key

    def end(self, key: int) -> None:
        self.running[key] = max(0, self.running[key] - 1)
        self.show(key)

    @property
    def cap(self) -> float:
        """What a replica may have with one request more."""
        return 1.25 * (sum(self.running[key] for key in self.open) + 1) / len(self.open) + 4


@settings(deadline=None)
@given(st.data(), st.sampled_from([1, 2, 5, 64, 65, 130]))
def test_only_those_that_may_be_chosen_are_and_none_beyond_the_cap(data: st.DataObject, count: int) -> None:
    """Through any history of requests, loads that others make, and replicas that come, go and stand aside."""
    generator = random.Random(data.draw(st.integers(0, 1 << 30)))
    cluster = Cluster(count, seed=generator.randrange(1 << 30))
    documents = [random_prompt(generator, BLOCK * generator.randrange(1, 5)) for _ in range(3)]
    for _ in range(60):
        key = generator.randrange(count)
        match generator.choice(["send"] * 6 + ["end", "load", "aside", "back", "lost"]):
            case "send":
                asked = prompt(*generator.choice(documents), *random_prompt(generator, generator.randrange(6)))
                cap, before = cluster.cap if cluster.open else 0.0, dict(cluster.running)
                beside = generator.choice([None, key])
                chosen = cluster.send(asked, beside)
                assert (chosen is None) == (not cluster.open)
                if chosen is not None:
                    assert chosen in cluster.open
                    assert before[chosen] + 1 <= cap
                    if beside in cluster.open and before[beside] + 1 <= cap:
                        assert chosen == beside, "choices of one request stay together"
            case "end":
                cluster.end(key)
            case "load":
                cluster.running[key], cluster.queued[key] = generator.randrange(40), generator.randrange(4000)
                cluster.show(key)
            case "aside":
                cluster.closed.add(key)
                cluster.show(key)
            case "back":
                cluster.closed.discard(key)
                cluster.show(key)
            case _:
                cluster.router.forget(key)
                cluster.running[key] = cluster.queued[key] = 0
                cluster.closed.add(key)


@settings(deadline=None)
@given(st.sampled_from([2, 7, 64, 100]), st.integers(1, 8), st.integers(0, 1 << 30))
def test_distinct_prompts_starve_no_replica(count: int, at_once: int, seed: int) -> None:
    """Each runs about as much as the others, at any load, though all prompts begin with the same."""
    generator = random.Random(seed)
    cluster = Cluster(count, seed)
    system = random_prompt(generator, 2 * BLOCK)
    live: list[int] = []
    given_to: Counter[int] = Counter()
    for _ in range(40 * count):
        if len(live) >= at_once * count:
            cluster.end(live.pop(generator.randrange(len(live))))
        chosen = cluster.send(prompt(*system, *random_prompt(generator, 2 * BLOCK)))
        assert chosen is not None
        live.append(chosen)
        given_to[chosen] += 1
    assert min(given_to[key] for key in range(count)) >= 8
    assert max(given_to.values()) <= 2 * 40


@given(st.sampled_from([2, 5, 64, 65, 200]), st.integers(0, 1 << 30))
def test_turns_follow_their_prefix(count: int, seed: int) -> None:
    """Of conversations that share their beginning, while no replica has more to do than another."""
    generator = random.Random(seed)
    cluster = Cluster(count, seed)
    system = random_prompt(generator, 8 * BLOCK)
    turns = {number: [*system, *random_prompt(generator, 4 * BLOCK)] for number in range(2 * count)}
    home = {}
    for number, said in turns.items():
        home[number] = cluster.send(prompt(*said))
    for key in cluster.running:
        cluster.running[key] = 0
        cluster.show(key)
    for number in generator.sample(sorted(turns), len(turns)):
        for _ in range(3):
            turns[number] += random_prompt(generator, generator.randrange(1, 30))
            chosen = cluster.send(prompt(*turns[number]))
            assert chosen == home[number]
            cluster.end(chosen)


def test_a_prefix_is_left_where_its_replica_has_more_to_do_than_it_saves() -> None:
    cluster = Cluster(2)
    said = list(range(25 * BLOCK))
    home = cluster.send(prompt(*said))
    assert home is not None
    cluster.end(home)
    for queued, stays in ((90, True), (110, False)):  # tokens; 99 are saved
        cluster.queued[home] = queued
        cluster.show(home)
        assert (cluster.router.choose(prompt(*said)) == home) == stays


def test_a_full_replica_is_not_asked_while_another_has_room() -> None:
    cluster = Cluster(3)
    said = prompt(*range(400))
    home = cluster.send(said)
    for key, (running, most) in {0: (3, 8), 1: (9, 40), 2: (9, 40)}.items():
        cluster.running[key], cluster.most[key] = running, most
    assert home is not None
    cluster.running[home] = cluster.most[home] = 2
    for key in cluster.running:
        cluster.show(key)
    assert cluster.send(said) != home
    for key in cluster.running:
        cluster.running[key] = cluster.most[key] = 2
    cluster.running[1], cluster.most[1] = 30, 31
    for key in cluster.running:
        cluster.show(key)
    assert cluster.send(said) == 1, "beyond the cap, rather than where it would be refused"


def test_where_less_was_cached_than_believed_the_oldest_is_forgotten() -> None:
    router = Cluster(2).router
    old, new = prompt(*range(40)), prompt(*range(100, 140))
    for said in (old, new):
        router.sent(0, said)
    assert router.sent(0, new) == 39, "one token is always computed"
    router.started(0, new, 39, 12)  # 27 tokens of it were gone: 6 blocks
    assert router.sent(0, new) == 39, "they are there again"
    assert router.sent(0, old) == 16
    router.started(0, old, 16, 40)
    assert router.sent(0, old) == 39
    router.started(0, old, 39, 0)
    router.started(0, old, 39, 0)
    assert router.sent(0, old) == 39, "however little there is beside it"
    assert router.sent(0, new) == 0
    router.forget(0)
    assert router.sent(0, old) == 0


@pytest.mark.parametrize("count", [65, 1000])
def test_a_choice_does_not_go_through_all_replicas(count: int) -> None:
    """By the instructions that it takes, however many have more than their share, and the more so of that prefix."""
    generator = random.Random(0)
    cluster = Cluster(count)
    said = prompt(*range(16 * BLOCK))
    for key in range(count):
        cluster.router.sent(key, Prompt(8 * BLOCK, said.hashes[: generator.randrange(17)]))
        cluster.running[key] = 1000 if key % 5 else 0
        cluster.show(key)
    most = 0
    for _ in range(50):
        most = max(most, instructions(lambda: cluster.router.choose(said)))
        load = ReplicaLoad(own=1000)
        most = max(most, instructions(partial(cluster.router.update, 1, load)))
    assert most < 5000
    assert cluster.router.choose(said) is not None
    assert len(cluster.router.candidates(said)) <= 2


def instructions(act: Any) -> int:
    """That Python executes while it acts."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(before)
    return count


def test_what_was_sent_counts_until_a_report_has_it() -> None:
    unreported = Unreported()
    unreported.sent(1, 100)
    unreported.sent(2, 20)
    unreported.sent(3, 3)
    unreported.reported()
    assert unreported.tokens == 123, "the replica may not have had them when it said so"
    unreported.admitted(1)
    assert unreported.tokens == 123
    unreported.reported()
    assert unreported.tokens == 23
    unreported.gone(2)
    unreported.gone(1)
    assert unreported.tokens == 3


# ---- the gateway ------------------------------------------------------------------------------------------------

SYSTEM = [7, 5, 9, 11, 4, 8, 20, 30]


def test_turns_go_where_their_conversation_was(tokenizer: Tokenizer) -> None:
    """Until that replica is silent, and when it is lost; an answer that was begun there goes on elsewhere."""

    async def run() -> None:
        async with gateway(tokenizer, 3, patience=SHORT) as g:
            for replica in g.replicas:
                replica.block_size = BLOCK
            await until(lambda: all(session.load.block_size for session in g.dispatcher.sessions))
            said = [*SYSTEM, *range(40, 600)]
            assert await tokens(g.start(said)) == expected(said)
            [home] = [replica for replica in g.replicas if replica.submitted]
            for turn in range(5):
                said = [*said, 60 + turn, 61, 62, 63, 64]
                assert await tokens(g.start(said)) == expected(said)
            assert len(home.submitted) == 6
            home.holds = lambda submit: True
            running = [g.start([*said, number, 3]) for number in range(3)]
            await until(lambda: len(home.submitted) == 9)
            home.silent = True
            await until(lambda: any(session.as_load().avoided for session in g.dispatcher.sessions))
            assert await tokens(g.start(said)) == expected(said)
            assert len(home.submitted) == 9, "nothing new went there"
            home.die()
            home.silent = False
            g.table(*(replica for replica in g.replicas if replica is not home))
            for number, one in enumerate(running):
                assert await tokens(one) == expected([*said, number, 3])

    asyncio.run(run())


def test_choices_of_one_request_stay_together(tokenizer: Tokenizer) -> None:
    async def run() -> None:
        async with gateway(tokenizer, 2) as g:
            for number in range(6):
                assert await tokens(g.start([*SYSTEM, number], 4)) == expected([*SYSTEM, number])
            for replica in g.replicas:
                prompts = Counter(tuple(submit.prompt) for submit in replica.submitted)
                assert set(prompts.values()) == {4}
            many = g.start(SYSTEM, 60, max_tokens=2)
            await tokens(many)
            for replica in g.replicas:
                share = sum(list(submit.prompt) == SYSTEM for submit in replica.submitted)
                assert share <= 1.25 * 30 + 4, "but no replica gets more than its share"

    asyncio.run(run())


@pytest.mark.parametrize("kept", [True, False])
def test_a_gateway_hears_what_was_cached(tokenizer: Tokenizer, kept: bool) -> None:
    """A replica that has lost what was sent there is not preferred for what was there before."""

    async def run() -> None:
        async with gateway(tokenizer, 2) as g:
            for replica in g.replicas:
                replica.block_size = BLOCK
                replica.cached = lambda submit: len(submit.prompt) - 1 if kept else 0
                replica.holds = lambda submit: submit.prompt[-1] == 3
            await until(lambda: all(session.load.block_size for session in g.dispatcher.sessions))
            first, second, third = ([*range(at, at + 400)] for at in (1000, 2000, 3000))
            for said in (first, second, third, third):
                assert await tokens(g.start(said)) == expected(said)
            [home] = [one for one in g.replicas if [submit.prompt[0] for submit in one.submitted] == [1000, 3000, 3000]]
            g.start([*third, 3])
            await until(lambda: len(home.submitted) == 4)
            assert await tokens(g.start(first)) == expected(first)
            assert (home.submitted[-1].prompt[0] == 1000) == kept

    asyncio.run(run())


def test_what_waits_at_a_replica_sends_what_is_new_to_another(tokenizer: Tokenizer) -> None:
    """Though no report says so, and the other has more requests."""

    async def run() -> None:
        async with gateway(tokenizer, 2) as g:
            for replica in g.replicas:
                replica.ponders = lambda submit: len(submit.prompt) > 100
                replica.holds = lambda submit: True
            large = g.start([9] * 1000)
            await until(lambda: any(replica.submitted for replica in g.replicas))
            [one] = [replica for replica in g.replicas if replica.submitted]
            small = [g.start([4, number]) for number in range(5)]
            await until(lambda: sum(len(replica.submitted) for replica in g.replicas) == 6)
            assert len(one.submitted) == 1
            for replica in g.replicas:
                replica.ponders = replica.holds = lambda submit: False
            assert await tokens(large) == expected([9] * 1000)
            for number, answer in enumerate(small):
                assert await tokens(answer) == expected([4, number])

    asyncio.run(run())
