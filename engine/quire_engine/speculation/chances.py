"""How likely drafts are, by what has become of others."""

from dataclasses import dataclass
from math import exp

from quire_engine.request import Request
from quire_engine.speculation.draft import Draft

_MEMORY = 64  # drafts of the whole engine that an estimate rests on
_LIFE = 512  # steps in which what they have shown fades, by e
_OWN_MEMORY = 0.85  # of what a request has shown, what is left a draft later
_OWN_LIFE = 64  # steps
_PRIOR = 4.0  # drafts that an estimate counts for by itself
_OWN_PRIOR = 0.5
_LEAST, _MOST = 0.02, 0.98


@dataclass(slots=True)
class Standing:
    """What has become of a request's drafts, and what had been expected. It fades."""

    hits: float = 0.0
    misses: float = 0.0
    foreseen_hits: float = 0.0
    foreseen_misses: float = 0.0
    last: int = 0  # the step of the last draft

    def take(self, hit: bool, chance: float, now: int) -> None:
        """A draft was accepted or not, where it had that chance by the drafts of all."""
        left = _left(now - self.last, _OWN_LIFE) * _OWN_MEMORY
        self.hits = self.hits * left + hit
        self.misses = self.misses * left + (not hit)
        self.foreseen_hits = self.foreseen_hits * left + chance
        self.foreseen_misses = self.foreseen_misses * left + 1 - chance
        self.last = now

    def factor(self, now: int) -> float:
        """Of the odds: how much better its drafts fare than others."""
        left = _left(now - self.last, _OWN_LIFE)
        hits = (self.hits * left + _OWN_PRIOR) / (self.foreseen_hits * left + _OWN_PRIOR)
        return hits * (self.foreseen_misses * left + _OWN_PRIOR) / (self.misses * left + _OWN_PRIOR)


@dataclass(slots=True)
class _Record:
    """Of drafts of about one estimate, in all requests."""

    tried: float = 0.0
    accepted: float = 0.0
    last: int = 0  # the step of the last of them

    def take(self, hit: bool, now: int) -> None:
        left = _left(now - self.last, _LIFE) * (1 - 1 / _MEMORY)
        self.tried, self.accepted, self.last = self.tried * left + 1, self.accepted * left + hit, now

    def chance(self, expected: float, now: int) -> float:
        left = _left(now - self.last, _LIFE)
        return (self.accepted * left + _PRIOR * expected) / (self.tried * left + _PRIOR)


class Chances:
    """Corrects what drafters estimate: by how drafts of such an estimate fared over the whole engine, first ones and
    later ones apart, and by how the request's fared beside these. A new request stands as all do.

    What was learnt fades with every step. So drafts of little luck are tried again, and the more seldom the less they
    would have to bring to be worth it.
    """

    def __init__(self) -> None:
        self._records = [(_Record(), _Record()) for _ in range(11)]  # by tenths of the estimate: first drafts, others
        self._standings: dict[int, Standing] = {}
        self.now = 0  # counts steps

    def reached(self, request: Request, draft: Draft, least: float) -> list[float]:
        """For each draft, the chance that it and all before it are accepted, until that falls below `least`."""
        standing = self._standings.get(request.id)
        factor = standing.factor(self.now) if standing is not None else 1.0
        chance, found = 1.0, []
        for place, estimate in enumerate(draft.chances):
            common = self._common(place, estimate)
            odds = factor * common / (1 - common)
            chance *= odds / (1 + odds)
            if chance < least:
                break
            found.append(chance)
        return found

    def first(self, request: Request, draft: Draft) -> float:
        """The chance of a draft's first token."""
        return self.reached(request, Draft(draft.tokens[:1], draft.chances[:1]), 0.0)[0]

    def learn(self, request: Request, draft: Draft, computed: int, accepted: int) -> None:
        """Of a draft so many were computed and so many accepted; what follows the first that was not says nothing."""
        standing = self._standings.setdefault(request.id, Standing())
        for place in range(min(accepted + 1, computed)):
            estimate, hit = draft.chances[place], place < accepted
            standing.take(hit, self._common(place, estimate), self.now)
            self._records[int(10 * estimate)][place > 0].take(hit, self.now)

    def forget(self, request: Request) -> None:
        """It has ended."""
        self._standings.pop(request.id, None)

    def _common(self, place: int, estimate: float) -> float:
        first, later = self._records[int(10 * estimate)]
        chance = first.chance(estimate, self.now)
        if place:
            chance = later.chance(chance, self.now)
        return min(max(chance, _LEAST), _MOST)


def _left(age: int, life: float) -> float:
    """Of what was learnt so many steps ago."""
    return exp(-age / life)
