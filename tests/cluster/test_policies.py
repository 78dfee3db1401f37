"""Decisions over plain data: no process, no clock."""

import random

import pytest
from quire_cluster.policies.admission import has_room, rebuild_wait
from quire_cluster.policies.hosts import Hosts
from quire_cluster.policies.quarantine import PROOF, Losses
from quire_cluster.policies.restart import Restarts
from quire_cluster.policies.routing import ReplicaLoad, choose_replica
from quire_cluster.policies.suspicion import Patience, Silence, Standing


def test_routing() -> None:
    assert choose_replica({}, 0) is None
    even = {"a": ReplicaLoad(own=2), "b": ReplicaLoad(own=2)}
    assert {choose_replica(even, turn) for turn in range(2)} == {"a", "b"}
    assert choose_replica({"a": ReplicaLoad(own=2), "b": ReplicaLoad(own=1)}, 0) == "b"
    others = ReplicaLoad(own=0, reported=9, own_at_report=1)  # another gateway keeps it busy
    assert choose_replica({"a": others, "b": ReplicaLoad(own=3)}, 0) == "b"
    stale = ReplicaLoad(own=5, reported=1, own_at_report=1)  # what was sent since its report counts
    assert stale.requests == 5
    silent = ReplicaLoad(own=0, avoided=True)
    assert choose_replica({"a": silent, "b": ReplicaLoad(own=3)}, 0) == "b"
    assert choose_replica({"a": silent}, 0) == "a", "a silent one is better than none"


def test_room() -> None:
    full = ReplicaLoad(own=2, reported=5, own_at_report=2, most=5)
    assert not has_room([full], 1)
    assert has_room([full, ReplicaLoad(own=0, most=3)], 3)
    assert not has_room([full, ReplicaLoad(own=0, most=3)], 4)
    assert has_room([ReplicaLoad(own=0, reported=5, own_at_report=2, most=5)], 2), "two of ours ended since"


def test_the_wait_for_a_replica_follows_how_long_one_takes_to_load() -> None:
    assert rebuild_wait(0.5) == 120
    assert rebuild_wait(600) == 1800


def test_gateways_are_where_replicas_are() -> None:
    """And stay for as long as it takes to start one again."""
    hosts, nodes = Hosts(), ["a", "head", "b"]
    assert hosts.of(nodes, "head", [], 0.0) == ["head"]
    assert hosts.of(nodes, "head", {"b"}, 1.0) == ["head", "b"]
    assert hosts.of(nodes, "head", {"a"}, 60.0) == nodes
    assert hosts.of(nodes, "head", {"a"}, 61.0) == ["a", "head"]
    assert hosts.of(["head"], "head", {"a"}, 62.0) == ["head"], "it is gone"


def test_silence() -> None:
    silence = Silence(Patience(avoid=2, move=10))
    for standing, ticks in ((Standing.GOOD, 7), (Standing.AVOIDED, 32), (Standing.LOST, 9)):
        for _ in range(ticks):
            silence.passed(0.25)
            assert silence.standing is standing
    silence.heard()
    assert silence.standing is Standing.GOOD
    silence.passed(3600.0)
    assert silence.standing is Standing.GOOD, "the gateway slept, and has not read what came meanwhile"


@pytest.mark.parametrize("explained", [True, False])
def test_of_requests_only_the_poison_is_convicted(explained: bool) -> None:
    """Any number of innocents and replicas; one request kills at a token of its own, at most two ahead of the log. The
    clock stands at a loss: what is resent kills at once, or after a rebuild."""
    generator = random.Random(0)
    for _ in range(300):
        life = Life(generator, generator.randrange(1, 12), poisons=1, latest=6, explained=explained)
        while life.poisons:
            life.step()
        assert life.deaths <= (2 if explained else 3)


@pytest.mark.parametrize("explained", [True, False])
def test_each_of_many_poisons_is_convicted_and_nothing_beside_it(explained: bool) -> None:
    """Others arrive all the time, poison among them that kills at its start, while nothing waits for its trial."""
    generator = random.Random(1)
    for _ in range(200):
        life = Life(
            generator, generator.randrange(1, 12), poisons=generator.randrange(1, 5), latest=PROOF, explained=explained
        )
        poisons = len(life.poisons)
        for _ in range(generator.randrange(30)):
            if life.trial is None and not life.waiting and generator.random() < 0.4:
                poisons += life.arrive(poison=generator.random() < 0.3)
            life.step()
        while life.poisons:
            life.step()
        assert life.deaths <= poisons * (2 if explained else 3)


class Life:
    """Of requests at one replica, which is there again at once. Each step they all get a token."""

    def __init__(self, generator: random.Random, count: int, *, poisons: int, latest: int, explained: bool) -> None:
        self.generator, self.explained = generator, explained
        self.logs: list[int] = []
        self.losses: list[Losses] = []
        self.poisons: dict[int, int] = {}  # the token that it kills at, before the `latest`
        self.latest = latest
        self.running: set[int] = set()
        self.waiting: list[int] = []  # suspects
        self.later: list[int] = []  # what is sent when they have had their trials
        self.trial: int | None = None
        self.now, self.lag, self.deaths = 0.0, generator.randrange(3), 0
        chosen = set(generator.sample(range(count), min(poisons, count)))
        for number in range(count):
            self.arrive(poison=number in chosen, log=generator.randrange(latest))

    def arrive(self, *, poison: bool, log: int = 0) -> bool:
        number = len(self.logs)
        if poison:
            self.poisons[number] = self.generator.randrange(self.latest)
            log = min(log, self.poisons[number])
        self.logs.append(log)
        self.losses.append(Losses())
        self._send(number)
        return poison

    def _send(self, number: int) -> None:
        self.losses[number].sent(self.logs[number])
        self.running.add(number)

    def step(self) -> None:
        assert self.deaths < 100, "what kills is found"
        if self.trial is None and self.waiting:
            self.trial = self.waiting.pop(0)
            self._send(self.trial)
        while self.trial is None and self.later:
            self._send(self.later.pop())
        if any(number in self.running and self.logs[number] + self.lag >= at for number, at in self.poisons.items()):
            self._die()
            return
        for number in self.running:
            self.logs[number] += 1
            if self.losses[number].grown(self.logs[number]) and number == self.trial:
                self.trial = None

    def _die(self) -> None:
        self.now, self.deaths = self.now + self.generator.choice((0.1, 30.0)), self.deaths + 1
        unproven = {number for number in self.running if not self.losses[number].proven(self.logs[number])}
        convicted = {
            number
            for number in self.running
            if self.losses[number].lost(
                self.now,
                near=number in unproven or not unproven,
                explained=self.explained,
                alone=unproven <= {number},
            )
        }
        assert convicted <= set(self.poisons)
        for number in convicted:
            del self.poisons[number]
        going_on, self.running, self.trial = sorted(self.running - convicted), set(), None
        for number in going_on:
            (self.waiting if self.losses[number].suspected else self.later).append(number)


def test_a_request_that_was_cleared_starts_afresh() -> None:
    losses = Losses()
    for number in range(5):
        losses.sent(10 * number)
        assert not losses.lost(100.0 * number, near=True, explained=True, alone=True)
        assert losses.suspected
        losses.sent(10 * number)
        assert not losses.grown(10 * number + PROOF - 1)
        assert losses.grown(10 * number + PROOF)
        assert not losses.suspected


def test_a_suspect_is_convicted_alone() -> None:
    losses = Losses()
    for number, (alone, convicted) in enumerate(((False, False), (False, False), (True, True))):
        losses.sent(0)
        assert losses.lost(100.0 * number, near=True, explained=True, alone=alone) == convicted
        assert losses.suspected


def test_replicas_that_vanish_together_count_once_and_no_more() -> None:
    losses = Losses()
    assert not losses.lost(10.0, near=True, explained=False, alone=True)
    assert not losses.lost(10.3, near=True, explained=False, alone=True)
    assert losses.lost(10.6, near=True, explained=False, alone=True), (
        "whatever kills each replica in turn is stopped all the same"
    )


def test_a_model_that_dies_loading_is_not_started_for_ever() -> None:
    """However long it loads before it dies."""
    restarts = Restarts()
    assert [restarts.failed(None, died=True) for _ in range(3)] == [0.0, 0.5, None]
    assert Restarts().failed(None, died=False) is None, "what it says is wrong will be so the next time"


def test_a_replica_that_served_is_started_again_with_growing_pauses() -> None:
    restarts = Restarts()
    assert restarts.failed(1000.0, died=True) == 0.0
    pauses = [restarts.failed(None, died=False) for _ in range(10)]
    assert pauses[-1] is None
    waits = [pause for pause in pauses if pause is not None]
    assert len(waits) == 9
    assert waits == sorted(waits)
    assert restarts.failed(31.0, died=True) == 0.0, "it served for long"


def test_no_request_makes_a_replica_be_given_up() -> None:
    """Each kills it as soon as it serves, with loads that fail in between."""
    restarts = Restarts()
    pauses: list[float] = []
    for number in range(100):
        pause = restarts.failed(0.1, died=True)
        assert pause is not None
        pauses.append(pause)
        if number % 10 == 9:
            assert None not in [restarts.failed(None, died=False) for _ in range(9)]
    assert pauses == sorted(pauses)
    assert pauses[-1] == 10.0, "it grows to a bound"
