"""What a gateway takes in, and how long it keeps what finds no replica. Plain data in, a decision out."""

import itertools
from collections.abc import Iterable

from quire_cluster.policies.routing import ReplicaLoad

_LEAST_WAIT = 120.0  # seconds; processes have to start, on a machine that may be busy
_LOADS = 3.0  # times that a replica took to load: it is lost, placed, read from a disk that others read too


def has_room(loads: Iterable[ReplicaLoad], count: int) -> bool:
    """Whether replicas will accept `count` requests more, as far as they have said. Asks no more of them than it has
    to."""
    return any(room >= count for room in itertools.accumulate(load.room for load in loads))


def rebuild_wait(load_seconds: float) -> float:
    """Seconds after which a replica that is gone should be back, where one took `load_seconds` to load."""
    return max(_LEAST_WAIT, _LOADS * load_seconds)
