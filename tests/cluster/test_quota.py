"""What gateways may let in together, over simulated ones: no process, no clock, no loop."""

from collections.abc import Iterable
from contextlib import suppress

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from quire_cluster.leases import Leases
from quire_cluster.policies.quota import Ask, Grants, LeasedRate, LeasedSlots, TenantAsk
from quire_engine.errors import ServerError

NUM_GATEWAYS = 3
SLACK = 1e-6  # of sums of floats


class Gateway:
    """One, with one tenant. `losses`: asks on their way to the controller, answers on their way back."""

    def __init__(self, world: "World", name: str) -> None:
        self.world = world
        self.name = name
        self.requests = LeasedRate(world.limit, world.now)
        self.slots = LeasedSlots(world.slots)
        self.waiting = 0
        self.running = 0
        self.gateways = 1
        self.number = 0
        self.alone = False
        self.asked: Ask | None = None  # the last time

    def admit(self) -> None:
        """A request comes: it is let in, or waits for the next ask."""
        if not self.take():
            self.waiting += 1

    def take(self) -> bool:
        """Lets one in, if it may."""
        now = self.world.now
        parts = (self.requests, self.slots)
        if any((part.share(now) if self.alone else part.held) < 1 for part in parts):
            return False
        for part in parts:
            part.use(1, now)
        self.running += 1
        self.world.admitted.append(now)
        self.world.check_running()
        return True

    def end(self) -> None:
        """The end of a request."""
        if self.running:
            self.running -= 1
            self.slots.use(-1, self.world.now)

    def ask(self, fate: str = "heard", *, more_to_come: bool = True) -> None:
        """For all that wait. What was not granted is refused."""
        now, waiting = self.world.now, self.waiting
        tenant = TenantAsk(
            revision=0,
            requests=self.requests.ask(waiting, now, more_to_come=more_to_come),
            tokens=None,
            slots=self.slots.ask(waiting, now, more_to_come=more_to_come),
        )
        self.number += 1
        ask = Ask(gateway=self.name, number=self.number, gateways=self.gateways, tenants={"a": tenant})
        if fate != "ask lost":
            self.asked = ask
            grants = self.world.lease(ask)
        if fate == "heard":
            self.hear(grants)
        elif self.world.shares and self.gateways > 1:
            self.alone = True
        self.waiting = 0
        for _ in range(waiting):
            self.take()

    def hear(self, grants: Grants) -> None:
        """The controller answers."""
        self.alone = False
        self.gateways = grants.gateways
        grant = grants.tenants["a"]
        assert grant.requests is not None
        assert grant.slots is not None
        self.requests.hear(grant.requests, grants.gateways, self.world.now)
        self.slots.hear(grant.slots, grants.gateways, self.world.now)

    def repeat(self) -> None:
        """The last ask comes once more, late: to a new controller it may be news."""
        if self.asked is not None:
            with pytest.raises(ServerError) if not self.world.lost else suppress(ServerError):
                self.world.lease(self.asked)


class World:
    """Some gateways and a controller. `shares`: gateways go on where the controller does not answer."""

    def __init__(self, limit: int, slots: int, *, shares: bool, gateways: int = NUM_GATEWAYS) -> None:
        self.limit, self.slots, self.shares = limit, slots, shares
        self.now = 1000.0
        self.began = self.now
        self.leases = Leases(self.now - 60)  # that it learns nothing any more
        self.lost = 0  # controllers
        self.dead: list[Gateway] = []
        self.admitted: list[float] = []
        self.gateways = [Gateway(self, f"gateway {at}") for at in range(gateways)]
        self.names = gateways
        for gateway in self.gateways:
            gateway.ask()
        self.all_ask()

    def lease(self, ask: Ask) -> Grants:
        return self.leases.lease(ask, self.now, len(self.gateways))

    def all_ask(self, **options: bool) -> None:
        for gateway in self.gateways:
            gateway.ask(**options)

    def wait(self, seconds: float, **options: bool) -> None:
        """Gateways that hold something ask once a second."""
        until = self.now + seconds
        while self.now < until:
            self.now = min(until, self.now + 1.0)
            if seconds >= 1:
                self.all_ask(**options)

    def restart(self) -> None:
        """The controller: it knows nothing."""
        self.leases = Leases(self.now)
        self.lost += 1

    def die(self, at: int) -> None:
        """A gateway, with all its requests; another one takes its place."""
        self.dead.append(self.gateways[at])
        self.gateways[at] = Gateway(self, f"gateway {self.names}")
        self.names += 1

    def act(self, what: str, at: int, amount: float) -> None:
        gateway = self.gateways[at % len(self.gateways)]
        match what:
            case "admit":
                for _ in range(int(amount)):
                    gateway.admit()
            case "end":
                for _ in range(int(amount)):
                    gateway.end()
            case "ask":
                gateway.ask()
            case "wait":
                self.wait(amount)
            case "moment":
                self.now += amount / 1000
            case "repeat":
                gateway.repeat()
            case "restart":
                self.restart()
            case "die":
                self.die(at % len(self.gateways))
            case _:
                gateway.ask(what)

    @property
    def most_running(self) -> int:
        """Exactly the limit; what is stated where gateways had to decide alone, or the controller forgot."""
        return self.slots + (self.slots + NUM_GATEWAYS if self.shares else 0)

    def check_running(self) -> None:
        running = sum(gateway.running for gateway in self.gateways)
        assert running <= self.most_running, f"{running} run, of {self.slots}"

    def check_rate(self) -> None:
        """In every window: from each moment with an admission to each later one."""
        more_at_once, more = 0.0, 0.0
        if self.shares:
            part = max(1.0, self.limit / NUM_GATEWAYS)
            more = NUM_GATEWAYS * part
            more_at_once = more + self.lost * self.limit + len(self.dead) * part
        for first, begun in enumerate(self.admitted):
            for last in range(first, len(self.admitted)):
                minutes = (self.admitted[last] - begun) / 60
                most = self.limit * (1 + minutes) + more_at_once + more * minutes
                assert last - first + 1 <= most + SLACK

    def check_nothing_is_lost(self) -> None:
        """Once everything has ended, a gateway gets the whole limit a minute later."""
        for gateway in self.gateways:
            gateway.waiting = 0
            while gateway.running:
                gateway.end()
        self.wait(75.0, more_to_come=False)
        gateway = self.gateways[0]
        before = len(self.admitted)
        for _ in range(self.limit + 1):
            gateway.admit()
            gateway.ask(more_to_come=False)
            gateway.end()
            gateway.ask(more_to_come=False)
        assert len(self.admitted) - before == self.limit
        self.wait(75.0, more_to_come=False)
        for _ in range(self.slots + 1):
            gateway.admit()
        gateway.ask(more_to_come=False)
        assert gateway.running == min(self.slots, self.limit)


def actions(*kinds: str) -> st.SearchStrategy[list[tuple[str, int, float]]]:
    amounts = st.sampled_from([1, 1, 2, 3, 5, 12, 40])
    return st.lists(st.tuples(st.sampled_from(kinds), st.integers(0, NUM_GATEWAYS - 1), amounts), max_size=60)


LIMITS = st.sampled_from([1, 2, 3, 10, 40, 100, 320])
SOUND = ("admit", "admit", "end", "ask", "ask", "wait", "moment", "repeat")
LOSSES = ("ask lost", "answer lost")


def play(world: World, acts: Iterable[tuple[str, int, float]]) -> None:
    for act in acts:
        world.act(*act)
    world.check_rate()
    world.check_nothing_is_lost()


@given(LIMITS, LIMITS, actions(*SOUND, *LOSSES))
@example(320, 320, [("admit", 0, 10), ("answer lost", 0, 1), ("admit", 0, 10), ("ask", 0, 1)])
@settings(max_examples=150, deadline=None)
def test_while_the_controller_is_there_limits_hold_exactly(
    limit: int, slots: int, acts: list[tuple[str, int, float]]
) -> None:
    """Also where calls are lost: requests that wait for them are refused here."""
    play(World(limit, slots, shares=False), acts)


@given(LIMITS, LIMITS, actions(*SOUND, *LOSSES, "restart", "die"))
@settings(max_examples=150, deadline=None)
def test_whatever_fails_no_more_is_let_in_than_is_stated(
    limit: int, slots: int, acts: list[tuple[str, int, float]]
) -> None:
    play(World(limit, slots, shares=True), acts)


@pytest.mark.parametrize("limit", [1, 7, 32, 1000])
def test_a_lone_gateway_gets_the_whole_limit(limit: int) -> None:
    world = World(limit, limit, shares=True, gateways=1)
    [gateway] = world.gateways
    for _ in range(limit + 5):
        gateway.admit()
    gateway.ask()
    assert gateway.running == limit
    for _ in range(600):  # and then what flows, for ten minutes
        for _ in range(2 + limit // 60):
            gateway.end()
            gateway.admit()
        world.wait(1.0)
    assert abs(len(world.admitted) - limit * 11) <= 1 + limit / 60 + limit / 32


def test_a_gateway_that_asks_more_often_does_not_starve_the_others() -> None:
    """Three want more than there is; one asks ten times as often as the others."""
    world = World(600, 10_000, shares=False)
    for gateway in world.gateways:
        for _ in range(200):
            gateway.admit()
        gateway.ask()
    counts = [0, 0, 0]
    for turn in range(12_000):
        world.now += 0.01
        for at, gateway in enumerate(world.gateways):
            if at == 0 or turn % 10 == at:
                before = gateway.running
                for _ in range(3):
                    gateway.admit()
                gateway.ask()
                counts[at] += gateway.running - before
    assert 3 * 600 - 60 <= len(world.admitted) <= 3 * 600, "a minute's limit at once, and two minutes"
    assert min(counts) >= 300, counts


def test_gateways_take_turns_where_there_is_one_slot() -> None:
    world = World(10**6, 1, shares=False, gateways=2)
    first, second = world.gateways
    begun = [0, 0]
    for _ in range(200):
        for at, gateway in enumerate((first, second)):
            world.now += 0.05
            gateway.end()
            before = gateway.running
            gateway.admit()
            gateway.ask()
            begun[at] += gateway.running - before
    assert min(begun) >= 0.4 * sum(begun), begun
    assert sum(begun) >= 130, "of three calls one finds the slot taken, and one that it is the other's turn"


def test_a_turn_that_nobody_takes_is_soon_over() -> None:
    world = World(10**6, 1, shares=False, gateways=2)
    first, second = world.gateways
    first.admit()
    first.ask()
    second.admit()
    second.ask()
    assert (first.running, second.running) == (1, 0)
    first.end()
    first.admit()
    first.ask()
    assert first.running == 0, "it is the other's turn"
    world.now += 1.5
    first.admit()
    first.ask()
    assert first.running == 1


def test_a_dead_gateway_s_slots_are_free_after_ten_seconds() -> None:
    world = World(1000, 10, shares=False, gateways=2)
    dead, other = world.gateways
    for _ in range(10):
        dead.admit()
    dead.ask()
    assert dead.running == 10
    world.gateways = [other]
    for at in range(1, 11):
        world.now += 1.0
        other.admit()
        other.ask()
        assert other.running == (1 if at == 10 else 0)
        dead.running *= at < 9


def test_a_new_controller_goes_on_where_the_old_one_was() -> None:
    """What was used is used, and what runs runs: gateways say so."""
    world = World(600, 30, shares=False)
    for gateway in world.gateways:
        for _ in range(9):
            gateway.admit()
        gateway.ask()
    world.restart()
    first, *others = world.gateways
    for _ in range(30):
        first.admit()
    first.ask()
    assert first.running == 10, "until the others say what they have, it gets no more than its share"
    for gateway in others:
        gateway.ask()
    world.now += 3.0
    for _ in range(30):
        first.admit()
    first.ask()
    assert sum(gateway.running for gateway in world.gateways) == 30
    left = max(gateway.requests.left(world.now) for gateway in world.gateways)
    assert left <= 600 - 30 + 600 * 3 / 60


def test_a_long_time_alone_costs_no_longer_time_afterwards() -> None:
    """What the share made up for meanwhile is no debt."""
    world = World(300, 100, shares=True)
    for gateway in world.gateways:
        gateway.ask("ask lost")
    for _ in range(1200):  # twenty minutes, with ten times as many requests as may be
        world.now += 1.0
        for gateway in world.gateways:
            for _ in range(50):
                gateway.admit()
                gateway.end()
            gateway.ask("ask lost")
    alone = len(world.admitted)
    assert 300 * 20 <= alone <= 300 * 22
    world.all_ask()
    world.now += 60.0
    before = len(world.admitted)
    for _ in range(300):
        world.gateways[0].admit()
        world.gateways[0].ask()
        world.gateways[0].end()
        world.all_ask(more_to_come=False)
    assert len(world.admitted) - before >= 290


def test_the_newest_limits_hold() -> None:
    """Whoever says them first; a gateway that does not know them yet changes nothing."""
    leases = Leases(0.0)

    def lease(gateway: str, number: int, revision: int, limit: int, now: float) -> int:
        requests = LeasedRate(limit, now).ask(limit, now, more_to_come=False)
        slots = LeasedSlots(limit).ask(limit, now, more_to_come=False)
        tenant = TenantAsk(revision=revision, requests=requests, tokens=None, slots=slots)
        grants = leases.lease(Ask(gateway=gateway, number=number, gateways=1, tenants={"a": tenant}), now, 1)
        grant = grants.tenants["a"]
        assert grant.requests is not None
        assert grant.slots is not None
        assert grant.slots.granted == grant.requests.granted
        return grant.requests.granted

    assert lease("a", 1, 1, 10, 100.0) == 10
    assert lease("b", 1, 2, 15, 100.0) == 5, "raised: what is more is there at once"
    assert lease("c", 1, 1, 10, 100.0) == 0
    assert lease("d", 1, 3, 4, 200.0) == 4, "lowered, and those that were silent are forgotten"
    assert lease("e", 1, 2, 15, 200.0) == 0


@given(st.lists(st.tuples(st.integers(-5, 50), st.floats(0, 100)), max_size=20), st.integers(1, 100))
def test_what_is_ahead_is_a_small_part(uses: list[tuple[int, float]], gateways: int) -> None:
    """Of one gateway a 32nd of the limit, of all of them an eighth, whatever is given back."""
    now = 0.0
    leased = LeasedRate(3200, now)
    leased.gateways = gateways
    for amount, seconds in uses:
        now += seconds
        leased.use(amount, now)
        assert leased.held <= leased.ahead <= 100
        assert leased.ahead * gateways <= 400


def test_windows_are_seen() -> None:
    """The check itself: it fails where a request more is let in."""
    world = World(10, 100, shares=False)
    world.admitted = [1000.0] * 5 + [1003.0] * 5 + [1006.0]
    world.check_rate()
    world.admitted.append(1006.0)
    with pytest.raises(AssertionError):
        world.check_rate()
