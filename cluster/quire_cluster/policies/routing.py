"""Which replica a request goes to. Plain data in, a choice out."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class ReplicaLoad:
    """What a gateway knows of a replica."""

    own: int  # requests this gateway has there now: exact
    reported: int = 0  # requests of all gateways, as the replica last said
    own_at_report: int = 0  # this gateway's, at that moment
    most: int = 0  # requests that it accepts
    avoided: bool = False  # it has been silent for a while

    @property
    def requests(self) -> int:
        """Requests there: the replica's own word, brought up to date by what this gateway did since."""
        return max(self.own, self.reported + self.own - self.own_at_report)

    @property
    def room(self) -> int:
        """How many more it accepts."""
        return max(0, self.most - self.requests)


def choose_replica(loads: Mapping[Key, ReplicaLoad], turn: int) -> Key | None:
    """The least loaded replica, equals in turn; one that is avoided where there is no other; None: there is none."""
    usable = {key: load for key, load in loads.items() if not load.avoided} or loads
    if not usable:
        return None
    least = min(load.requests for load in usable.values())
    best = [key for key, load in usable.items() if load.requests == least]
    return best[turn % len(best)]
