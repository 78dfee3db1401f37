"""What a gateway takes in, and how long it keeps what finds no replica. Plain data in, a decision out."""

import itertools
from collections import Counter
from collections.abc import Iterable

from quire_engine.fairness import Shares, admits

from quire_cluster.policies.routing import ReplicaLoad

_LEAST_WAIT = 120.0  # seconds; processes have to start, on a machine that may be busy
_LOADS = 3.0  # times that a replica took to load: it is lost, placed, read from a disk that others read too


def has_room(loads: Iterable[ReplicaLoad], count: int) -> bool:
    """Whether replicas will accept `count` requests more, as far as they have said. Asks no more of them than it has
    to."""
    return any(room >= count for room in itertools.accumulate(load.room for load in loads))


class UnderWay:
    """Answers that a gateway has at replicas, by tenant. What other gateways have there it does not know: a replica has
    the last word on what it takes, and here only what it would refuse for sure is refused before it is sent."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._weights: dict[str, float] = {}  # of these tenants

    def add(self, tenant: str, weight: float) -> None:
        """One of them is sent."""
        self._counts[tenant] += 1
        self._weights[tenant] = weight

    def remove(self, tenant: str) -> None:
        """One of them is there no more."""
        self._counts[tenant] -= 1
        if not self._counts[tenant]:
            del self._counts[tenant], self._weights[tenant]

    def takes(self, loads: Iterable[ReplicaLoad], count: int, tenant: str, weight: float) -> bool:
        """Whether replicas that have no room by what they said may take `count` more of a tenant, as others fill them:
        it has no more than its share of them."""
        total = most = 0
        for load in loads:
            total, most = total + load.requests, most + load.most
        share = Shares(self._weights | {tenant: weight}, most).of(tenant)
        return admits(count, total=total, own=self._counts[tenant], most=most, share=share)


def rebuild_wait(load_seconds: float) -> float:
    """Seconds after which a replica that is gone should be back, where one took `load_seconds` to load."""
    return max(_LEAST_WAIT, _LOADS * load_seconds)
