"""Which replica a request goes to. Plain data in, a choice out."""

import random
import sys
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from quire_cluster.policies.prefixes import PrefixMap, Prompt, bits

Key = TypeVar("Key", bound=Hashable)

_RUNNING = 64  # prompt tokens that a request there weighs: a step computes one token of it beside those of prompts
_SHARE, _SLACK = 1.25, 4  # requests of one replica: times the mean, and more
_ALL = 64  # replicas up to which all are looked at
_DRAWS = 32  # beyond: replicas looked at until two are found that may have more
_MAP_BYTES = 128 << 20


@dataclass(frozen=True, kw_only=True)
class ReplicaLoad:
    """What a gateway knows of a replica."""

    own: int  # requests this gateway has there now: exact
    reported: int = 0  # requests of all gateways, as the replica last said
    own_at_report: int = 0  # this gateway's, at that moment
    most: int = 0  # requests that it accepts
    queued: int = 0  # prompt tokens that it has yet to compute
    pages: int = 0  # blocks of tokens that its cache holds; 0: not said yet
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


class Unreported:
    """Prompt tokens that were sent to a replica, and that its last report cannot have counted."""

    def __init__(self) -> None:
        self.tokens = 0
        self._sent: dict[int, int] = {}  # request → tokens
        self._admitted: list[int] = []

    def sent(self, request: int, tokens: int) -> None:
        """A request with so many tokens to compute."""
        self._sent[request] = tokens
        self.tokens += tokens

    def admitted(self, request: int) -> None:
        """The replica has it: the next report counts it."""
        self._admitted.append(request)

    def reported(self) -> None:
        """The replica said how much waits there."""
        for request in self._admitted:
            self.gone(request)
        self._admitted.clear()

    def gone(self, request: int) -> None:
        """It is not to be counted (any more)."""
        self.tokens -= self._sent.pop(request, 0)


class _Replica(Generic[Key]):
    """As the router sees it."""

    __slots__ = ("key", "most", "number", "pages", "place", "queued", "requests", "turn")

    def __init__(self, key: Key, number: int) -> None:
        self.key = key
        self.number = number  # of its bit
        self.place = -1  # among those that are open; -1: it is not
        self.requests = self.queued = self.pages = 0
        self.most = 0  # requests that it accepts, as far as it has said
        self.turn = 0  # when something was last sent there


class Router(Generic[Key]):
    """Sends a request where it is computed soonest: where prompt tokens that are not cached there, prompt tokens that
    are queued there, and a weight for each request that runs there, add up to the least.

    A replica gets nothing while it would have more than 1.25 times the mean of requests, and 4: however dear a prefix
    is, its replica does not become the one that all wait for. The 4 are for when there is little to do: below that a
    prefix that has to be computed again costs more than company does, as a step takes hardly longer for a few requests
    than for one. They also leave room always: who has no more than the mean may have one more. What a replica itself
    accepts bounds it as well.

    Beyond 64 replicas two are looked at (Mitzenmacher 2001): one of those where the longest prefix is known, and one of
    all, both drawn; so gateways that do not know of each other do not all run to the same one. Neither that nor
    anything else here goes through all replicas.
    """

    def __init__(self, generator: random.Random, *, map_bytes: int = _MAP_BYTES) -> None:
        self._generator = generator
        self._prefixes = PrefixMap(map_bytes)
        self._replicas: dict[Key, _Replica[Key]] = {}
        self._numbered: list[_Replica[Key] | None] = []
        self._open: list[_Replica[Key]] = []  # those that may be chosen
        self._open_bits = 0
        self._requests = 0  # of these
        self._turn = 0
        self.block_size = 0  # tokens; 0: not known yet

    # ---- what becomes of replicas ---------------------------------------------------------------------------------

    def update(self, key: Key, load: ReplicaLoad | None) -> None:
        """What is known of a replica now. None: nothing may be sent there, for a while or for good."""
        replica = self._replicas.get(key)
        if load is None:
            if replica is not None:
                self._close(replica)
            return
        if replica is None:
            replica = self._add(key)
        if replica.place < 0:
            replica.place = len(self._open)
            self._open.append(replica)
            self._open_bits |= 1 << replica.number
            self._requests += replica.requests
        requests = load.requests
        self._requests += requests - replica.requests
        replica.requests, replica.most = requests, load.most or sys.maxsize
        replica.queued, replica.pages = load.queued, load.pages

    def forget(self, key: Key) -> None:
        """It is lost, with all that it had cached."""
        replica = self._replicas.pop(key, None)
        if replica is not None:
            self._close(replica)
            self._prefixes.forget(replica.number)
            self._numbered[replica.number] = None

    def started(self, key: Key, prompt: Prompt, believed: int, cached: int) -> None:
        """A request was begun there, with so many tokens cached; `believed`: what `sent` had returned. Where that was
        more, the cache holds less than was believed: as much of the oldest is forgotten. The prompt itself is there
        now."""
        replica = self._replicas.get(key)
        if replica is not None and believed > cached:
            self._prefixes.shrink(replica.number, (believed - cached) // self.block_size)
            self._prefixes.learn(replica.number, prompt.hashes, replica.pages)

    # ---- requests -------------------------------------------------------------------------------------------------

    def choose(self, prompt: Prompt, beside: Key | None = None) -> Key | None:
        """The replica for a request. `beside`: where another choice of the same one went, so that its prompt is there:
        there too, as long as that may have more. None: nothing may be sent anywhere."""
        if not self._open:
            return None
        sibling = self._replicas.get(beside) if beside is not None else None
        if sibling is not None and sibling.place >= 0 and sibling.requests < min(self._cap, sibling.most):
            return sibling.key
        size, last = self.block_size, prompt.tokens - 1  # which is always computed
        ranks = [
            (one.queued + _RUNNING * one.requests - min(blocks * size, last), one.turn, one.number)
            for one, blocks in self._candidates(prompt)
        ]
        return self._at(min(ranks)[2]).key

    def candidates(self, prompt: Prompt) -> list[Key]:
        """Those that are looked at for it."""
        return [replica.key for replica, _ in self._candidates(prompt)]

    def sent(self, key: Key, prompt: Prompt) -> int:
        """A request goes there, chosen here or not: how many of its tokens are believed to be cached there."""
        replica = self._replicas.get(key) or self._add(key)
        self._turn += 1
        replica.turn = self._turn
        known = self._prefixes.learn(replica.number, prompt.hashes, replica.pages)
        return min(known * self.block_size, prompt.tokens - 1)

    @property
    def _cap(self) -> int:
        """Requests that one replica may have, with the one that is to be sent."""
        return int(_SHARE * (self._requests + 1) / len(self._open) + _SLACK)

    def _candidates(self, prompt: Prompt) -> list[tuple[_Replica[Key], int]]:
        """With how many of the prompt's first blocks each is believed to have. Where none may have more, one that
        accepts more if there is one, and of these one with few requests."""
        found = self._prefixes.found(prompt.hashes, self._open_bits)
        cap = self._cap
        looked = self._all(found) if len(self._open) <= _ALL else self._drawn(found, cap)
        good = [one for one in looked if one[0].requests < cap and one[0].requests < one[0].most]
        return good or [min(looked, key=_fullness)]

    def _all(self, found: list[tuple[int, int]]) -> list[tuple[_Replica[Key], int]]:
        at = self._at
        return [(at(number), blocks) for blocks, mask in found for number in bits(mask)]

    def _drawn(self, found: list[tuple[int, int]], cap: int) -> list[tuple[_Replica[Key], int]]:
        """Until two may have more. At most four fifths of all have more than 1.25 times the mean, so that is soon. The
        draw among holders is not an even one, which their loads make up for."""
        draw = self._generator.randrange
        looked: list[tuple[_Replica[Key], int]] = []
        good = 0
        for blocks, mask in found[: _DRAWS // 4]:
            at = draw(mask.bit_length())
            above = mask >> at
            replica = self._at(at + (above & -above).bit_length() - 1)
            looked.append((replica, blocks))
            if replica.requests < min(cap, replica.most):
                good = 1
                break
        while good < 2 and len(looked) < _DRAWS:
            replica = self._open[draw(len(self._open))]
            bit = 1 << replica.number
            looked.append((replica, next(blocks for blocks, mask in found if mask & bit)))
            good += replica.requests < min(cap, replica.most)
        return looked

    def _at(self, number: int) -> _Replica[Key]:
        replica = self._numbered[number]
        assert replica is not None, "a bit stands for a replica"
        return replica

    def _add(self, key: Key) -> _Replica[Key]:
        number = next((n for n, replica in enumerate(self._numbered) if replica is None), len(self._numbered))
        if number == len(self._numbered):
            self._numbered.append(None)
        replica = self._numbered[number] = self._replicas[key] = _Replica(key, number)
        self._prefixes.add(number)
        return replica

    def _close(self, replica: _Replica[Key]) -> None:
        """The last one takes its place."""
        if replica.place >= 0:
            last = self._open.pop()
            if last is not replica:
                self._open[replica.place] = last
                last.place = replica.place
            replica.place = -1
            self._open_bits ^= 1 << replica.number
            self._requests -= replica.requests


def _fullness(one: tuple[_Replica[Key], int]) -> tuple[bool, int]:
    replica, _ = one
    return (replica.requests >= replica.most, replica.requests)
