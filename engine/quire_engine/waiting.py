"""What requests wait for, and the queue of those without a row. Pure bookkeeping."""

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import chain, count

from quire_engine.fairness import Account, Accounts, Line
from quire_engine.request import Request, State


class WaitsFor(Enum):
    """All that a request may wait for: "it waits for ...". Every report and every metric uses these words."""

    REPLICA = "a replica"
    UNSUSPECTED = "a replica without a suspect"  # a request that may have killed one
    WORD = "word from its replica"
    GRAMMAR = "its grammar to be compiled"
    STEP = "the next step"
    EARLIER = "requests that came before it"
    TURN = "requests of tenants that were served less"
    PRIORITY = "requests of higher priority"
    ROW = "a row in the batch"
    PAGES = "pages of the cache"
    PREEMPTED = "pages again, which it gave to others"
    BUDGET = "the token budget of a step"
    WHOLE = "a step with room for its whole prompt"
    IMAGE = "an image of its prompt"


@dataclass(frozen=True, slots=True)
class Wait:
    """Of one request, as of the step planned last."""

    reason: WaitsFor | None  # None: it runs
    since: float  # when it began to wait, on the clock of its arrival
    tokens_ahead: int  # known and not computed, of requests that go first; fewer where the cache holds some of them


class WaitingQueue:
    """Requests without a row: the queue, and apart from it those that cannot be computed yet. In the queue the most
    important class goes first, within it the tenant that was served least, within that who came first.
    Other threads may read `len`, `tokens` and `counts`: each is of some moment."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts
        self._lines: list[tuple[int, int, Line]] = []  # a heap by class of those in which somebody waits, or has
        self._numbers = count()
        self._lengths: dict[int, int] = {}  # of what waits: request id → tokens of its log when it came here
        self._num_fresh = 0  # requests that have never run
        self._apart: dict[State, dict[int, Request]] = {State.PREPARING: {}, State.FETCHING: {}}
        self._head: tuple[Request, Account] | None = None  # as it was when it was last looked for
        self.tokens = 0  # of all their logs, as long as they were when they came here

    def __len__(self) -> int:
        return len(self._lengths) + sum(map(len, self._apart.values()))

    def __bool__(self) -> bool:
        """Whether there is a queue."""
        return bool(self._lengths)

    def __iter__(self) -> Iterator[Request]:
        """The queue, in no order."""
        for _, _, line in self._lines:
            for account in line.present.values():
                yield from account.waiting.values()

    @property
    def head(self) -> Request | None:
        """Whose turn it is."""
        self._find_head()
        return self._head[0] if self._head is not None else None

    def _find_head(self) -> None:
        while self._lines:
            line = self._lines[0][-1]
            if (account := line.first) is not None:
                self._head = account.first, account
                return
            line.listed = False
            heapq.heappop(self._lines)
        self._head = None

    def push(self, request: Request) -> None:
        """It waits in the queue from now on."""
        request.state = State.WAITING
        account = self._accounts.of(request)
        line = account.line
        if not account.waiting:
            self._accounts.lift(account)
        account.waiting[request.id] = request
        heapq.heappush(account.queue, (request.arrival, request.id, request))
        line.put(account)
        if not line.listed:
            line.listed = True
            heapq.heappush(self._lines, (line.kind, next(self._numbers), line))
        self._lengths[request.id] = len(request.tokens)
        self.tokens += len(request.tokens)
        self._count(request, account, 1)
        self._find_head()

    def put_apart(self, request: Request, state: State) -> None:
        """It cannot be computed yet: PREPARING or FETCHING."""
        request.state = state
        self._apart[state][request.id] = request

    def take_apart(self, request_id: int, state: State) -> Request | None:
        """It need not be apart any more; None: it was not."""
        return self._apart[state].pop(request_id, None)

    def fetched(self, requests: Iterable[Request]) -> None:
        """Those of them that were FETCHING wait in the queue again."""
        for request in requests:
            if self.take_apart(request.id, State.FETCHING) is not None:
                self.push(request)

    def remove(self, request: Request) -> None:
        """It has its row now, or its ending."""
        if request.state is not State.WAITING:
            del self._apart[request.state][request.id]
            return
        account = self._accounts.of(request)
        if account is account.line.next and request is account.first:
            account.line.next = None
        del account.waiting[request.id]
        self.tokens -= self._lengths.pop(request.id)
        self._count(request, account, -1)
        while account.queue and account.queue[0][1] not in account.waiting:
            heapq.heappop(account.queue)
        if not account.waiting:
            account.line.take(account)
        self._find_head()

    def prefer(self, request: Request) -> None:
        """The first of its tenant goes before those of tenants that were served less, once: others were preempted for
        it."""
        account = self._accounts.of(request)
        account.line.next = account

    def _count(self, request: Request, account: Account, change: int) -> None:
        if not request.has_run:
            self._num_fresh += change
            account.num_fresh += change
            account.line.num_fresh += change

    def reason(self, request: Request, held: dict[Request, WaitsFor]) -> WaitsFor:
        """What one of them waits for. `held`: why the last plan left out the head, if it looked at it."""
        if request.has_run:
            return WaitsFor.PREEMPTED
        assert self._head is not None, "a waiting request is not in the queue"
        head, first = self._head
        account = self._accounts.of(request)
        if head is request:
            return held.get(request, WaitsFor.STEP)
        if account is first:
            return WaitsFor.EARLIER
        return WaitsFor.TURN if account.line is first.line else WaitsFor.PRIORITY

    def explain(
        self, asked: Sequence[Request], running: Iterable[Request], held: dict[Request, WaitsFor]
    ) -> list[Wait]:
        """What each of some requests waits for. `running`: all that have rows."""
        ahead, tokens = {}, 0
        for other in self._in_order(running):
            ahead[other] = tokens
            tokens += other.num_uncomputed
        return [Wait(self._why(request, held), request.waiting_since, ahead[request]) for request in asked]

    def _in_order(self, running: Iterable[Request]) -> list[Request]:
        """All requests, as they want tokens of a step: what runs, then what waits, by class, and within one by what
        their tenants will have been served when all that these want before has been."""
        found = [(r.state is not State.RUNNING, r.arrival, r.id, r) for r in chain(running, *self._everything())]
        found.sort(key=lambda one: one[:3])
        served: dict[Account, int] = {}
        places = []
        for waits, arrival, request_id, request in found:
            account = self._accounts.of(request)
            counter = served.get(account, account.counter)
            served[account] = counter + request.num_uncomputed * account.price
            places.append((waits, account.line.kind, counter, arrival, request_id, request))
        return [place[-1] for place in sorted(places, key=lambda place: place[:-1])]

    def _everything(self) -> list[Iterable[Request]]:
        return [*(apart.values() for apart in self._apart.values()), self]

    def _why(self, request: Request, held: dict[Request, WaitsFor]) -> WaitsFor | None:
        if request.state is State.PREPARING:
            return WaitsFor.GRAMMAR
        if request.state is State.FETCHING:
            return WaitsFor.IMAGE
        return self.reason(request, held) if request.state is State.WAITING else held.get(request)

    def counts(self, held: dict[Request, WaitsFor]) -> Counter[WaitsFor]:
        """How many wait for what, without a look at each. `held`: what the last plan left out."""
        fresh = self._num_fresh
        found: Counter[WaitsFor] = Counter({WaitsFor.PREEMPTED: len(self._lengths) - fresh})
        found[WaitsFor.GRAMMAR] = len(self._apart[State.PREPARING])
        found[WaitsFor.IMAGE] = len(self._apart[State.FETCHING])
        found.update(why for request, why in held.items() if request.state is State.RUNNING)
        if (first := self._head) is not None:
            head, account = first
            peers, of_class = account.num_fresh, account.line.num_fresh
            found[WaitsFor.PRIORITY] = fresh - of_class
            found[WaitsFor.TURN] += of_class - peers
            found[WaitsFor.EARLIER] = peers
            if not head.has_run:
                found[WaitsFor.EARLIER] -= 1
                found[held.get(head, WaitsFor.STEP)] += 1
        return +found  # what is above 0

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Raises AssertionError unless the counts are those of the requests, which are all there are."""
        everywhere = {State.WAITING: list(self)} | {state: apart.values() for state, apart in self._apart.items()}
        for state, kept in everywhere.items():
            there = {id(request) for request in requests if request.state is state}
            assert {id(request) for request in kept} == there, f"the list of what is {state.name.lower()} is wrong"
        waiting = list(self)
        assert len(waiting) == len(self._lengths), "a request waits twice"
        assert {request.id for request in waiting} == self._lengths.keys(), "a waiting request is not in the queue"
        assert (self.head in waiting) if waiting else self.head is None, "the head of the queue does not wait"
        assert self.tokens == sum(self._lengths.values()), "the count of waiting tokens is wrong"
        fresh = Counter(self._accounts.of(request) for request in waiting if not request.has_run)
        assert self._num_fresh == fresh.total(), "so many were not preempted"
        assert all(account.num_fresh == number for account, number in fresh.items()), "the counts by tenant are wrong"
        by_line = Counter(account.line for account in fresh.elements())
        assert all(by_line[line] == line.num_fresh for _, _, line in self._lines), "the counts by priority are wrong"


class Deadlines:
    """When requests that have a deadline have to end."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Request]] = []

    def add(self, request: Request) -> None:
        """One without a deadline is not noted."""
        if request.deadline:
            heapq.heappush(self._heap, (request.deadline, request.id, request))

    def passed(self, now: float) -> Iterator[Request]:
        """Each one once, though it may have ended."""
        while self._heap and self._heap[0][0] <= now:
            yield heapq.heappop(self._heap)[2]
