"""Fairness between tenants within a class of priority: the Virtual Token Counter (Sheng et al., "Fairness in Serving
Large Language Models", OSDI 2024), weighted. Pure bookkeeping: no torch, no clock.

A tenant's counter grows by what is computed for it: a token of a prompt by 1, a token drawn by 2, over the tenant's
weight. Whoever waits and has the least goes first. What is charged is real: tokens found in the prefix cache cost
nothing, and neither do drafts that prove wrong, nor what is computed again after a preemption.

There is a counter per class and tenant. With one for all classes, a tenant that was served while it alone had urgent
requests would be behind in every other class, and one that waited in a class that gets nothing would shut out all
others once it sends something urgent. Who may use which class is not decided here.

A tenant that begins to wait gets the least counter of those that wait already, or where none does, the counter of the
one that was the last to, if its own is less: so nothing is saved by having been idle. What steps in flight compute is
on the counters already and comes after it all the same: the least is taken without that, but no lower than any other
that waits is without its own. Once nobody of a class has anything here, all that was asked for has been served, and
every counter is forgotten.

The bound. Let C be the most that one request can cost (its prompt, and twice its output), R the rows and w a tenant's
weight. Of two tenants that wait, let f be the one with the greater counter. It was admitted last when its counter was
not greater than the other's (the least goes first), or the other one came when f's was not greater, but for what it had
in flight; since then only what it had in rows by then, of which that is a part, has been computed for it, at most R
requests: so the counters differ by at most R C / w_f. A counter grows by service / weight and nothing else while its
tenant waits; so over any interval in which f and g both wait throughout, service / weight of the two differs by at most
R C (1 / w_f + 1 / w_g).
"""

import heapq
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import count

from quire_engine.config import SchedulerLimits
from quire_engine.errors import QueueFull
from quire_engine.request import Request, State

OUTPUT_PRICE = 2  # of a token drawn, in tokens of a prompt
_UNIT = 1 << 40  # of counters, to a token at weight 1: they are whole numbers, so that none is too small to count
_MOST_GONE = 1024  # tenants of a class that have nothing here, whose counters are kept for when they return


class Shares:
    """What of a number is due to each of some tenants, by weight; at least 1, so that many are not all left nothing."""

    def __init__(self, weights: Mapping[str, float], most: int) -> None:
        self._weights = weights
        self._per_weight = most / sum(weights.values())

    def of(self, tenant: str) -> float:
        """One of them's."""
        return max(1.0, self._weights[tenant] * self._per_weight)


_Place = tuple[int, float, int, int, "Account"]  # counter, arrival and id of its first request, a number


class Account:
    """A tenant in a class of priority, and its requests that wait for a row."""

    __slots__ = (
        "counter",
        "line",
        "num_fresh",
        "num_requests",
        "num_running",
        "owed",
        "place",
        "price",
        "queue",
        "tenant",
        "waiting",
        "weight",
    )

    def __init__(self, line: "Line", tenant: str) -> None:
        self.line = line
        self.tenant = tenant
        self.weight = 1.0
        self.price = _UNIT  # of a prompt's token
        self.counter = line.level
        self.owed = 0  # below 0: what it was charged for tokens in flight that nobody got; its next ones are free
        self.num_requests = 0  # that are here, in whatever state
        self.num_running = 0  # of these, those that have a row
        self.waiting: dict[int, Request] = {}  # those in the queue, by id
        self.queue: list[tuple[float, int, Request]] = []  # of the same a heap, whose top waits; others may have left
        self.num_fresh = 0  # of the same, those that have never run
        self.place: _Place | None = None  # in the line's heap; None: nothing waits

    @property
    def first(self) -> Request:
        """Of those that wait."""
        return self.queue[0][2]

    def weigh(self, weight: float) -> None:
        """As its latest request says. What was charged before stays."""
        self.weight = weight
        self.price = round(_UNIT / weight)

    def charge(self, request: Request) -> None:
        """What was computed and drawn for a request of its, or is in flight, and is not charged yet. To be asked before
        the request gives its pages back."""
        prompt = min(request.num_computed, request.num_given) - request.charged_prompt
        drawn = len(request.tokens) - request.charged_length
        if request.state is not State.FINISHED:  # else what is in flight is dropped
            drawn += request.pending
        if prompt > 0:
            request.charged_prompt += prompt
            self.owed += prompt * self.price
        if drawn:
            request.charged_length += drawn
            self.owed += OUTPUT_PRICE * drawn * self.price
        if self.owed > 0:
            self.counter += self.owed
            self.owed = 0

    def now(self) -> tuple[int, float, int]:
        """Where it belongs in the line."""
        arrival, request_id, _ = self.queue[0]
        return self.counter, arrival, request_id


class Line:
    """A class of priority: the tenants of which something waits for a row, the least served first."""

    def __init__(self, kind: int) -> None:
        self.kind = kind
        self.present: dict[str, Account] = {}  # tenants that have requests here
        self.num_fresh = 0  # requests in the queue that have never run
        self.level = 0  # the counter of a tenant that is not known: no less than that of any that was forgotten
        self.next: Account | None = None  # for whose request others were preempted: it goes before the least served
        self.listed = False  # among the lines that have somebody
        self._heap: list[_Place] = []  # one place of each tenant counts, and is never behind where it belongs
        self._numbers = count()
        self._gone: dict[str, Account] = {}  # tenants that have nothing here and a counter above the least
        self._going: list[tuple[int, int, Account]] = []  # a heap of these by counter, and of some that came back
        self._last: Account | None = None  # the tenant that was the last to wait

    def account(self, tenant: str) -> Account:
        """The tenant's, who has something here from now on."""
        account = self.present.get(tenant)
        if account is None:
            gone = self._gone
            account = self.present[tenant] = gone.pop(tenant) if tenant in gone else Account(self, tenant)
        return account

    def leave(self, account: Account) -> None:
        """The tenant has nothing here any more. A counter that would be lifted to the least is forgotten, and the
        smallest where there are too many: what is not known begins no lower."""
        del self.present[account.tenant]
        self._gone[account.tenant] = account
        heapq.heappush(self._going, (account.counter, next(self._numbers), account))
        least = self.least
        while self._going and (
            len(self._going) > _MOST_GONE or (least is not None and self._going[0][0] <= least.counter)
        ):
            counter, _, gone = heapq.heappop(self._going)
            if self._gone.get(gone.tenant) is gone and gone.counter == counter:
                del self._gone[gone.tenant]
                self.level = max(self.level, counter)

    @property
    def least(self) -> Account | None:
        """Of those that wait the one that was served least; of equals the one whose first request came first."""
        heap = self._heap
        while heap:
            place = heap[0]
            account = place[-1]
            if place is not account.place:
                heapq.heappop(heap)
            elif place[:3] == (now := account.now()):
                return account
            else:
                account.place = (*now, next(self._numbers), account)
                heapq.heapreplace(heap, account.place)
        return None

    @property
    def first(self) -> Account | None:
        """Whose turn it is."""
        if self.next is not None and self.next.waiting:
            return self.next
        return self.least

    def floor(self, in_flight: Mapping["Account", int]) -> int:
        """The counter of one that begins to wait is no less. `in_flight`: what of each counter nobody has yet."""
        account = self.least or self._last
        if account is None:
            return 0
        others = [one for one in self.present.values() if one.waiting] or [account]
        return min(account.counter, max(one.counter - in_flight.get(one, 0) for one in others))

    def put(self, account: Account) -> None:
        """Something of it waits."""
        now = account.now()
        if account.place is None or now < account.place[:3]:
            account.place = (*now, next(self._numbers), account)
            heapq.heappush(self._heap, account.place)

    def take(self, account: Account) -> None:
        """Nothing of it waits any more."""
        account.place = None
        self._last = account

    def check_integrity(self) -> None:
        """Raises AssertionError unless every tenant that waits is found, and the least served first."""
        waiting = [account for account in self.present.values() if account.waiting]
        assert all(account.place in self._heap for account in waiting), "a tenant that waits is not in its line"
        assert all(account.place is None for account in self.present.values() if not account.waiting)
        assert self.least is min(waiting, key=Account.now, default=None), "the least served does not come first"
        assert len(self._gone) <= len(self._going) <= _MOST_GONE, "tenants that left are not forgotten"
        assert not self._gone.keys() & self.present.keys(), "a tenant is here and gone"


class Accounts:
    """Of all tenants in all classes."""

    def __init__(self, limits: SchedulerLimits, in_flight: Callable[[], Iterable[tuple[Request, int]]]) -> None:
        """`in_flight`: what steps that are not committed compute for each of their requests, as it is charged."""
        self.limits = limits
        self._in_flight = in_flight
        self._lines: dict[int, Line] = {}
        self._running: dict[Request, Account] = {}  # in the order in which they took their rows
        self._tenants: Counter[str] = Counter()  # that have something here, with the number of classes it is of

    @property
    def contested(self) -> bool:
        """Whether there are several tenants. Where there is one, nothing here costs a step anything: its counters lag
        behind until another one comes."""
        return len(self._tenants) > 1

    def kind(self, request: Request) -> int:
        """Its class."""
        return request.priority if self.limits.by_priority else 0

    def importance(self, request: Request) -> tuple[int, float, int]:
        """Where one tenant is alone, the least goes first."""
        return self.kind(request), request.arrival, request.id

    @property
    def lines(self) -> Mapping[int, Line]:
        """Those of which something is here, by class."""
        return self._lines

    def of(self, request: Request) -> Account:
        """The account of a request that is here."""
        return self._lines[self.kind(request)].present[request.tenant]

    # ---- requests come and go -------------------------------------------------------------------------------------

    def check_room(self, request: Request, waiting: int, most: int) -> None:
        """Raises QueueFull where the queue, in which `waiting` requests are, does not take this one. `most`: where one
        tenant is alone; see `admits`."""
        if waiting < most:
            return
        weights, own = {request.tenant: request.weight}, 0
        for line in self._lines.values():
            for account in line.present.values():
                weights.setdefault(account.tenant, account.weight)
                if account.tenant == request.tenant:
                    own += account.num_requests - account.num_running
        if not admits(1, total=waiting, own=own, most=most, share=Shares(weights, most).of(request.tenant)):
            raise QueueFull(f"{waiting} requests wait already; try again later")

    def come(self, request: Request) -> None:
        """It is here from now on."""
        kind = self.kind(request)
        line = self._lines.get(kind) or self._lines.setdefault(kind, Line(kind))
        self._tenants[request.tenant] += request.tenant not in line.present
        account = line.account(request.tenant)
        account.num_requests += 1
        if request.weight != account.weight:
            self.settle()
            account.weigh(request.weight)

    def leave(self, request: Request) -> None:
        """It has its ending."""
        account = self.of(request)
        account.charge(request)
        account.num_requests -= 1
        if not account.num_requests:
            line = account.line
            line.leave(account)
            self._tenants[request.tenant] -= 1
            if not self._tenants[request.tenant]:
                del self._tenants[request.tenant]
            if not line.present:
                del self._lines[line.kind]

    def start(self, request: Request) -> None:
        """It has a row, and what was found of it in the cache costs nothing."""
        account = self._running[request] = self.of(request)
        account.num_running += 1
        request.charged_prompt = max(request.charged_prompt, min(request.num_computed, request.num_given))

    def stop(self, request: Request) -> None:
        """It loses its row, and has not given back what it had computed yet."""
        account = self._running.pop(request)
        account.charge(request)
        account.num_running -= 1

    # ---- what they were served ------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Charges what running requests were served since."""
        for request, account in self._running.items():
            account.charge(request)

    def charge(self, request: Request) -> None:
        """Of one that runs, at once: what it got counts when the next is chosen."""
        self._running[request].charge(request)

    def lift(self, account: Account) -> None:
        """It begins to wait."""
        if len(account.line.present) > 1:
            self.settle()
            in_flight: Counter[Account] = Counter()
            for request, tokens in self._in_flight():
                if (served := self._running.get(request)) is not None:
                    in_flight[served] += tokens * served.price
            account.counter = max(account.counter, account.line.floor(in_flight))

    def in_order(self, running: list[Request], room: int) -> list[Request]:
        """These by importance, as they are given; where tenants compete, and there is not room for all, by rank."""
        if not self.contested or room >= len(running):
            return list(running)
        self.settle()
        return sorted(running, key=self.rank)

    def in_turn(self, requests: list[Request]) -> Iterator[Request]:
        """The same, but by rank as it is when the turn of each comes."""
        if not (self.contested and requests):
            yield from requests
            return
        self.settle()
        queues: dict[Account, deque[Request]] = {}
        for request in requests:
            if request.state is State.RUNNING:
                queues.setdefault(self._running[request], deque()).append(request)
        while queues:
            account = min(queues, key=lambda a: self.rank(queues[a][0]))
            yield queues[account].popleft()
            if not queues[account]:
                del queues[account]

    def least_important(self, running: list[Request], planned: Iterable[Request]) -> Request:
        """Of those that run and are not planned: of the worst class, the latest of the tenant that was served most."""
        kept = {id(request) for request in planned}
        return max((request for request in running if id(request) not in kept), key=self.rank)

    def rank(self, request: Request) -> tuple[int, int, float, int]:
        """Of one that runs or waits: its class, what its tenant was served, arrival, id. The least goes first."""
        account = self._running.get(request) or self.of(request)
        return account.line.kind, account.counter, request.arrival, request.id

    def precedes(self, waiting: Request, running: Request) -> bool:
        """Whether tokens of a step are due to one that waits before one that runs: in the same class its tenant was
        served less."""
        kind, counter, *_ = self.rank(waiting)
        other, served, *_ = self.rank(running)
        return kind == other and counter < served

    def over_share(
        self, head: Request, *, rows: int, pages: int, wanted: int, own_pages: Callable[[Request], int]
    ) -> list[Request]:
        """Running requests to preempt, so that the head of the queue finds `rows` and `pages` that it lacks; none where
        that would not be enough. `wanted`: pages that it will hold; `own_pages`: what one gives back, and one more is
        not kept free for it.

        A tenant's share of rows and pages is by weight, among the tenants that have something here in the head's class
        and in worse ones; at least one. Only who has less than its share of both, and still has no more with what it
        takes, may take; only who has as much as its share left may lose, and in the same class only one that was served
        more. So two tenants cannot preempt each other in turn: the taker is at or below its shares afterwards, whose
        victim would have to be above one; the victim's tenant is still at or above its share, whose taker would have to
        be below. In worse classes nobody may take from a better one.
        """
        taker = self.of(head)
        kind, tenant, limits = taker.line.kind, head.tenant, self.limits
        weights: dict[str, float] = {}
        held_rows: Counter[str] = Counter()
        for line in self._lines.values():
            if line.kind >= kind:
                for account in line.present.values():
                    weights[account.tenant] = account.weight
                    held_rows[account.tenant] += account.num_running
        due_rows, due_pages = (Shares(weights, most) for most in (limits.max_num_seqs, limits.num_pages))
        if held_rows[tenant] + 1 > due_rows.of(tenant):
            return []
        if rows > 0 and not any(held - 1 >= due_rows.of(name) for name, held in held_rows.items() if held):
            return []
        held_pages: Counter[str] = Counter()
        may_lose: dict[str, list[tuple[int, float, int, int, Request]]] = {}
        for request, account in self._running.items():
            if account.line.kind >= kind:
                own = own_pages(request)
                held_pages[account.tenant] += own
                served_more = account.line.kind > kind or account.counter > taker.counter
                if account.tenant != tenant and served_more and not request.at_last_token:
                    rank = (account.line.kind, request.arrival, request.id, own, request)
                    may_lose.setdefault(account.tenant, []).append(rank)
        if held_pages[tenant] + wanted > due_pages.of(tenant):
            return []
        for ranks in may_lose.values():
            ranks.sort(key=lambda rank: rank[:3])
        found: list[Request] = []
        while rows > 0 or pages > 0:
            held, due = (held_rows, due_rows) if rows > 0 else (held_pages, due_pages)
            able = [
                name
                for name, ranks in may_lose.items()
                if ranks and held[name] - (1 if held is held_rows else ranks[-1][3]) >= due.of(name)
            ]
            if not able:
                return []
            name = max(able, key=lambda name: held[name] / weights[name])
            *_, own, victim = may_lose[name].pop()
            held_rows[name] -= 1
            held_pages[name] -= own
            rows, pages = rows - 1, pages - own - 1
            found.append(victim)
        return found

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Raises AssertionError unless the accounts are those of the requests, which are all there are."""
        there = list(requests)
        counts = Counter((self.kind(request), request.tenant) for request in there)
        kept = {
            (line.kind, account.tenant): account.num_requests
            for line in self._lines.values()
            for account in line.present.values()
        }
        assert kept == counts, "a tenant's requests are lost or counted twice"
        running = {request for request in there if request.state is State.RUNNING}
        assert self._running.keys() == running, "a running request is on no account"
        rows = Counter(self._running.values())
        accounts = [account for line in self._lines.values() for account in line.present.values()]
        assert all(account.num_running == rows[account] for account in accounts), "a tenant's rows are counted wrong"
        assert self._tenants == Counter(tenant for _, tenant in counts), "a tenant is lost, or not forgotten"
        for line in self._lines.values():
            line.check_integrity()


def admits(count: int, *, total: int, own: int, most: int, share: float) -> bool:
    """Whether a queue of `most` takes `count` more beside `total`, of which `own` are the same tenant's. Whoever has no
    more than its share of it is not shut out by what others have there; twice as many is the end for all."""
    return total + count <= most or (own + count <= share and total + count <= 2 * most)
