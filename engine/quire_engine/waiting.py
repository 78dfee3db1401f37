"""What requests wait for, and the queue of those without a row. Pure bookkeeping."""

import heapq
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate, chain

from quire_engine.request import Request, State

Importance = tuple[int, float, int]  # its class (the priority, where that counts), arrival, id; the least goes first


class WaitsFor(Enum):
    """All that a request may wait for: "it waits for ...". Every report and every metric uses these words."""

    REPLICA = "a replica"
    UNSUSPECTED = "a replica without a suspect"  # a request that may have killed one
    WORD = "word from its replica"
    GRAMMAR = "its grammar to be compiled"
    STEP = "the next step"
    EARLIER = "requests that came before it"
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
    """Requests without a row: the queue, the most important first, and apart from it those that cannot be computed yet.
    Other threads may read `len`, `tokens` and `counts`: each is of some moment."""

    def __init__(self, importance: Callable[[Request], Importance]) -> None:
        self._importance = importance
        self._heap: list[tuple[Importance, Request]] = []  # its top waits; below, some may have left
        self._lengths: dict[int, int] = {}  # of what waits: request id → tokens of its log when it came here
        self._fresh: Counter[int] = Counter()  # requests that have never run, by class
        self._apart: dict[State, dict[int, Request]] = {State.PREPARING: {}, State.FETCHING: {}}
        self._num_preempted = 0
        self.tokens = 0  # of all their logs, as long as they were when they came here

    def __len__(self) -> int:
        return len(self._lengths) + sum(map(len, self._apart.values()))

    def __bool__(self) -> bool:
        """Whether there is a queue."""
        return bool(self._lengths)

    def __iter__(self) -> Iterator[Request]:
        """The queue, in no order."""
        return (request for _, request in self._heap if request.id in self._lengths)

    @property
    def head(self) -> Request | None:
        """The most important one."""
        return self._heap[0][1] if self._heap else None

    def push(self, request: Request) -> None:
        """It waits in the queue from now on."""
        request.state = State.WAITING
        heapq.heappush(self._heap, (self._importance(request), request))
        self._lengths[request.id] = len(request.tokens)
        self.tokens += len(request.tokens)
        self._count(request, 1)

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
        self.tokens -= self._lengths.pop(request.id)
        self._count(request, -1)
        while self._heap and self._heap[0][1].id not in self._lengths:
            heapq.heappop(self._heap)

    def _count(self, request: Request, change: int) -> None:
        if request.has_run:
            self._num_preempted += change
            return
        kind = self._importance(request)[0]
        self._fresh[kind] += change
        if not self._fresh[kind]:
            del self._fresh[kind]

    def reason(self, request: Request, held: dict[Request, WaitsFor]) -> WaitsFor:
        """What one of them waits for. `held`: why the last plan left out the head, if it looked at it."""
        if request.has_run:
            return WaitsFor.PREEMPTED
        head = self.head
        assert head is not None, "a waiting request is not in the queue"
        if head is request:
            return held.get(request, WaitsFor.STEP)
        same = self._importance(head)[0] == self._importance(request)[0]
        return WaitsFor.EARLIER if same else WaitsFor.PRIORITY

    def explain(
        self, asked: Sequence[Request], running: Iterable[Request], held: dict[Request, WaitsFor]
    ) -> list[Wait]:
        """What each of some requests waits for. `running`: all that have rows."""
        places = sorted(self._place(request) for request in asked)
        lacking = [0] * (len(places) + 1)  # tokens between two places
        for other in chain(running, *(apart.values() for apart in self._apart.values()), self):
            lacking[bisect_right(places, self._place(other))] += other.num_uncomputed
        ahead = dict(zip(places, accumulate(lacking[:-1]), strict=True))
        return [Wait(self._why(r, held), r.waiting_since, ahead[self._place(r)]) for r in asked]

    def _place(self, request: Request) -> tuple[bool, Importance]:
        """Where it stands among those that want tokens of a step."""
        return (request.state is not State.RUNNING, self._importance(request))

    def _why(self, request: Request, held: dict[Request, WaitsFor]) -> WaitsFor | None:
        if request.state is State.PREPARING:
            return WaitsFor.GRAMMAR
        if request.state is State.FETCHING:
            return WaitsFor.IMAGE
        return self.reason(request, held) if request.state is State.WAITING else held.get(request)

    def counts(self, held: dict[Request, WaitsFor]) -> Counter[WaitsFor]:
        """How many wait for what, without a look at each. `held`: what the last plan left out."""
        found: Counter[WaitsFor] = Counter({WaitsFor.PREEMPTED: self._num_preempted})
        found[WaitsFor.GRAMMAR] = len(self._apart[State.PREPARING])
        found[WaitsFor.IMAGE] = len(self._apart[State.FETCHING])
        found.update(why for request, why in held.items() if request.state is State.RUNNING)
        behind = len(self._lengths) - self._num_preempted
        for (kind, *_), head in self._heap[:1]:
            peers = self._fresh.get(kind, 0)
            if not head.has_run:
                found[held.get(head, WaitsFor.STEP)] += 1
                peers, behind = peers - 1, behind - 1
            found[WaitsFor.EARLIER] += peers
            found[WaitsFor.PRIORITY] += behind - peers
        return +found  # what is above 0

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Raises AssertionError unless the counts are those of the requests, which are all there are."""
        everywhere = {State.WAITING: list(self)} | {state: apart.values() for state, apart in self._apart.items()}
        for state, kept in everywhere.items():
            there = {id(request) for request in requests if request.state is state}
            assert {id(request) for request in kept} == there, f"the list of what is {state.name.lower()} is wrong"
        waiting = list(self)
        assert {request.id for request in waiting} == self._lengths.keys(), "a waiting request is not in the queue"
        assert all(head in waiting for _, head in self._heap[:1]), "the head of the queue does not wait"
        assert self.tokens == sum(self._lengths.values()), "the count of waiting tokens is wrong"
        assert self._num_preempted == sum(request.has_run for request in waiting), "so many were not preempted"
        fresh = Counter(self._importance(request)[0] for request in waiting if not request.has_run)
        assert fresh == self._fresh, "the counts by priority are wrong"


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
