"""How likely drafts are, by what has become of others."""

from dataclasses import dataclass

from quire_engine.request import Request
from quire_engine.speculation.draft import Draft

_MEMORY = 64  # drafts of the whole engine that an estimate rests on
_OWN_MEMORY = 0.85  # of what a request has shown, what is left a draft later
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
    factor: float = 1.0  # of the odds: how much better its drafts fare than others
    due: int = 0  # the step from which it may be probed
    wait: int = 1  # from one probe to the next

    def take(self, hit: bool, chance: float) -> None:
        """A draft was accepted or not, where it had that chance by the drafts of all."""
        self.hits = self.hits * _OWN_MEMORY + hit
        self.misses = self.misses * _OWN_MEMORY + (not hit)
        self.foreseen_hits = self.foreseen_hits * _OWN_MEMORY + chance
        self.foreseen_misses = self.foreseen_misses * _OWN_MEMORY + 1 - chance
        hits = (self.hits + _OWN_PRIOR) / (self.foreseen_hits + _OWN_PRIOR)
        self.factor = hits * (self.foreseen_misses + _OWN_PRIOR) / (self.misses + _OWN_PRIOR)


class Chances:
    """Corrects what drafters estimate: by how drafts of such an estimate fared over the whole engine, first ones and
    later ones apart, and by how the request's fared beside these. A new request stands as all do."""

    def __init__(self) -> None:
        self._accepted = [[0.0, 0.0] for _ in range(11)]  # by tenths of the estimate
        self._tried = [[0.0, 0.0] for _ in range(11)]
        self._standings: dict[int, Standing] = {}

    def standing(self, request: Request) -> Standing:
        """Of a request, made where there is none."""
        standing = self._standings.get(request.id)
        if standing is None:
            standing = self._standings[request.id] = Standing()
        return standing

    def reached(self, request: Request, draft: Draft, least: float) -> list[float]:
        """For each draft, the chance that it and all before it are accepted, until that falls below `least`."""
        factor = self.standing(request).factor
        chance, found = 1.0, []
        for place, estimate in enumerate(draft.chances):
            common = self._common(place, estimate)
            odds = factor * common / (1 - common)
            chance *= odds / (1 + odds)
            if chance < least:
                break
            found.append(chance)
        return found

    def learn(self, request: Request, draft: Draft, computed: int, accepted: int) -> None:
        """Of a draft so many were computed and so many accepted; what follows the first that was not says nothing."""
        standing = self.standing(request)
        for place in range(min(accepted + 1, computed)):
            estimate, hit = draft.chances[place], place < accepted
            standing.take(hit, self._common(place, estimate))
            tried, taken, later = self._tried[int(10 * estimate)], self._accepted[int(10 * estimate)], place > 0
            kept = min(1.0, _MEMORY / (tried[later] + 1))
            tried[later] = (tried[later] + 1) * kept
            taken[later] = (taken[later] + hit) * kept

    def forget(self, request: Request) -> None:
        """It has ended."""
        self._standings.pop(request.id, None)

    def _common(self, place: int, estimate: float) -> float:
        tried, taken = self._tried[int(10 * estimate)], self._accepted[int(10 * estimate)]
        chance = (taken[0] + _PRIOR * estimate) / (tried[0] + _PRIOR)
        if place:
            chance = (taken[1] + _PRIOR * chance) / (tried[1] + _PRIOR)
        return min(max(chance, _LEAST), _MOST)
