"""Which drafts are worth computing: those that bring more tokens a second than the step would without them."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from quire_engine.request import Request
from quire_engine.speculation.costs import StepCosts, Typical
from quire_engine.speculation.draft import Draft

_HOPELESS = 0.05  # a draft less likely to be reached and accepted is not looked at
_MEMORY = 64  # trials that an estimate of the whole engine rests on
_OWN_MEMORY = 0.85  # of what a request has shown, what is left a trial later
_RAREST = 64  # steps between two probes of a request, at most
_SPENT = 0.01  # of all time, what may be lost to probes
_CREDIT = 2.0  # steps that may be lost to begin with
_SAVED = 6.0  # steps that may be saved up for probes
_GROWTH = 1.5  # from the largest size known to one that may be tried
_SHARE = 0.1  # of the time that drafts save, what may be lost to probes
_CONTROL = 96  # steps that were asked about, after which what plain ones take is measured again
_CONTROLS = 2  # plain steps in a row: the first is not overlapped with the one before it


@dataclass(slots=True)
class _Standing:
    """What has become of a request's drafts, and what had been expected. It fades."""

    hits: float = 0.0
    misses: float = 0.0
    foreseen_hits: float = 0.0
    foreseen_misses: float = 0.0
    factor: float = 1.0  # of the odds
    due: int = 0  # the step from which it may be probed
    wait: int = 1  # from one probe to the next

    def take(self, hit: bool, chance: float) -> None:
        self.hits = self.hits * _OWN_MEMORY + hit
        self.misses = self.misses * _OWN_MEMORY + (not hit)
        self.foreseen_hits = self.foreseen_hits * _OWN_MEMORY + chance
        self.foreseen_misses = self.foreseen_misses * _OWN_MEMORY + 1 - chance
        better = (self.hits + 0.5) / (self.foreseen_hits + 0.5)
        self.factor = better * (self.foreseen_misses + 0.5) / (self.misses + 0.5)


class _Calibration:
    """How often drafts are accepted that a drafter gave such a chance, first ones and others, over all requests."""

    def __init__(self) -> None:
        self._accepted = [0.0] * 22
        self._tried = [0.0] * 22

    def chance(self, place: int, estimate: float) -> float:
        """Of the draft at that place, if those before it were accepted."""
        cell = 2 * int(10 * estimate)
        found = (self._accepted[cell] + 4 * estimate) / (self._tried[cell] + 4)
        if place:
            found = (self._accepted[cell + 1] + 4 * found) / (self._tried[cell + 1] + 4)
        return min(max(found, 0.02), 0.98)

    def take(self, place: int, estimate: float, hit: bool) -> None:
        cell = 2 * int(10 * estimate) + (place > 0)
        if self._tried[cell] >= _MEMORY:
            self._tried[cell] *= 1 - 1 / _MEMORY
            self._accepted[cell] *= 1 - 1 / _MEMORY
        self._tried[cell] += 1
        self._accepted[cell] += hit


@dataclass(slots=True)
class _Choice:
    """Of a step that drafters were asked for."""

    decoding: int
    beside: int
    drafts: int
    trial: bool  # nobody knows what a step of that size takes
    accepted: int = 0


class Value:
    """Weighs the drafts of a step against what they cost, after TurboSpec (Liu et al., arXiv 2406.14066), which
    maximizes goodput: accepted tokens a second. One thread; what it says is a function of what it was told.

    A step that drafts is planned when the one before it has ended, so nothing overlaps: its time is measured apart.
    Drafts are computed that are expected to pay. What it takes to find out whether they would (asking, drafts of
    requests that had no luck, steps of sizes never seen) is paid from a purse, into which a share of all time goes.
    """

    def __init__(self, most: int) -> None:
        """`most`: drafts of a request."""
        self.most = most
        self.plain = StepCosts()
        self.drafted = StepCosts(like=self.plain)
        self._calibration = _Calibration()
        self._standings: dict[int, _Standing] = {}
        self._now = 0  # counts steps
        self._waits: deque[tuple[float, int]] = deque(maxlen=64)
        self._gaps: deque[tuple[float, int]] = deque(maxlen=64)
        self._gap = 0.0  # what a step takes longer for having been asked about
        self._gain = 0.0  # of asking, of late: time saved, in steps
        self._purse = 0.0  # seconds
        self._row = 0  # steps that were asked about since plain ones were last measured
        self._until = 8  # of them, how many may be
        self._control = 0  # plain steps still to be made
        self._choice: _Choice | None = None

    # ---- before a step ----------------------------------------------------------------------------------------------

    def worth_asking(self, decoding: int, beside: int) -> bool:
        """Whether drafters are to be asked, for which the step before has to end, in a step of so many certain tokens
        and so many of prompts."""
        if not decoding or not self.plain.knows(decoding):
            return False
        if self._control:
            self._control -= 1
            return False
        if self._row >= self._until:
            self._row, self._control, self._until = 0, _CONTROLS - 1, min(2 * self._until, _CONTROL)
            return False
        if self._gain <= 0:
            needed = 2 * (self._gap + self._extra(decoding, beside, 1))
            if self._purse < min(needed, _SAVED / 2 * self.plain.seconds(decoding + beside)):
                return False
        return self._could_pay(decoding, beside)

    def _could_pay(self, decoding: int, beside: int) -> bool:
        """Whether drafts would if all were accepted."""
        worth = self.plain.seconds(decoding) / decoding
        drafts = 1
        while drafts <= self.most * decoding:
            if self._extra(decoding, beside, drafts) < drafts * worth:
                return True
            drafts *= 2
        return False

    def _extra(self, decoding: int, beside: int, drafts: int) -> float:
        """Seconds that drafts add to a step. Beside prompts by what plain steps show: differences between those of
        drafted steps and of plain ones are lost in the noise there."""
        if beside or not self.drafted:
            certain = decoding + beside
            return self.plain.seconds(certain + drafts) - self.plain.seconds(certain) + self._gap
        return max(0.0, self.drafted.seconds(decoding + drafts) - self.plain.seconds(decoding))

    def choose(
        self, requests: Sequence[Request], drafts: Sequence[Draft], decoding: int, beside: int, room: int
    ) -> list[int]:
        """How many of each request's drafts to compute, `room` in all at most. The step has `decoding` certain tokens,
        one of each of these requests among them, and `beside` ones of prompts."""
        counts = [0] * len(requests)
        known = max(0, int(self.drafted.top) - decoding)
        most = min(room, max(known, int(_GROWTH * max(self.drafted.top, decoding)) + 1 - decoding))
        while most > known and self._extra(decoding, beside, most) > self._purse:
            most = max(known, most // 2)
        candidates = self._candidates(requests, drafts)
        number, gain = self._best(candidates[:most], decoding, beside)
        doubted = bool(number) and not beside and gain < self._error(decoding, number)
        if doubted and self._extra(decoding, beside, number) > self._purse:
            number, gain, doubted = 0, 0.0, False
        for _, index, _ in candidates[:number]:
            counts[index] += 1
        probes = self._probe(requests, drafts, counts, decoding, beside, number, most - number)
        for index in probes:
            counts[index] = 1
        drafted = number + len(probes)
        trial = not beside and (drafted > known or doubted)
        if not number:
            gain = -self._gap
        if not trial:
            self._pay(decoding, beside, number, drafted, gain)
        self._gain = min(self._gain + (gain / self.plain.seconds(decoding + beside) - self._gain) / 16, 0.5)
        self._choice = _Choice(decoding, beside, drafted, trial)
        return counts

    def _error(self, decoding: int, drafts: int) -> float:
        """How much of what drafts seem to save may be noise."""
        plain = self.plain.seconds(decoding)
        counts = max(1, self.plain.count(decoding)), max(1, self.drafted.count(decoding + drafts))
        return self.plain.noise * plain * sqrt(1 / counts[0] + 1 / counts[1])

    def _pay(self, decoding: int, beside: int, number: int, drafted: int, gain: float) -> None:
        if drafted > number:
            before = self._extra(decoding, beside, number) if number else self._gap
            self._purse -= max(0.0, self._extra(decoding, beside, drafted) - before)
        if gain > 0:
            self._purse += _SHARE * gain
        elif self._gain <= 0:
            self._purse += gain

    def _probe(
        self,
        requests: Sequence[Request],
        drafts: Sequence[Draft],
        counts: Sequence[int],
        decoding: int,
        beside: int,
        chosen: int,
        most: int,
    ) -> list[int]:
        """Of which requests a draft is computed to find out what comes of it."""
        before = self._extra(decoding, beside, chosen) if chosen else self._gap
        free = self._extra(decoding, beside, chosen + 1) - before <= 0.002 * self.plain.seconds(decoding)
        found: list[int] = []
        for index, request in enumerate(requests):
            if counts[index] or not drafts[index].tokens:
                continue
            standing = self._standing(request)
            if standing.due > self._now and not free:
                continue
            number = chosen + len(found) + 1
            if len(found) >= most or self._extra(decoding, beside, number) - before > self._purse / 2:
                break
            standing.due = self._now + standing.wait
            standing.wait = min(2 * standing.wait, _RAREST)
            found.append(index)
        return found

    def _candidates(self, requests: Sequence[Request], drafts: Sequence[Draft]) -> list[tuple[float, int, int]]:
        """Every draft that is not hopeless, the likeliest first: minus the chance that it is reached and accepted,
        whose it is, its place. A request's come in their order, for their chances fall."""
        found = []
        calibrated = self._calibration.chance
        for index, (request, draft) in enumerate(zip(requests, drafts, strict=True)):
            if not draft.chances:
                continue
            factor = self._standing(request).factor
            reached = 1.0
            for place, estimate in enumerate(draft.chances[: self.most]):
                odds = calibrated(place, estimate)
                odds *= factor / (1 - odds)
                reached *= odds / (1 + odds)
                if reached < _HOPELESS:
                    break
                found.append((-reached, index, place))
        found.sort()
        return found

    def _best(self, candidates: list[tuple[float, int, int]], decoding: int, beside: int) -> tuple[int, float]:
        """How many of the candidates pay most, and the seconds that they save. A token drawn now saves what it would
        take in a step of its own kind without prompts beside it; how long that is, is what the first pass finds."""
        plain = self.plain.seconds(decoding)
        gain, gains = 0.0, []
        for number, (chance, _, _) in enumerate(candidates, 1):
            gain -= chance
            if number <= 16 or number % (number // 8) == 0 or number == len(candidates):
                gains.append((number, gain))
        rate, best, saved = decoding / plain, 0, 0.0
        for number, gain in gains:
            extra = self._extra(decoding, 0, number)
            found = (decoding + gain) / (plain + extra)
            if found > rate:
                rate, best = found, number
                saved = gain * plain / decoding - extra
        if beside:
            best, saved = 0, 0.0
            for number, gain in gains:
                found = gain / rate - self._extra(decoding, beside, number)
                if found > saved:
                    best, saved = number, found
        return best, saved

    def _standing(self, request: Request) -> _Standing:
        standing = self._standings.get(request.id)
        if standing is None:
            standing = self._standings[request.id] = _Standing()
        return standing

    # ---- after it ---------------------------------------------------------------------------------------------------

    def learn(self, request: Request, draft: Draft, computed: int, accepted: int) -> None:
        """So many of a draft were computed, and so many accepted. Before `timed` of that step."""
        standing = self._standing(request)
        for place in range(min(accepted + 1, computed)):
            estimate, hit = draft.chances[place], place < accepted
            standing.take(hit, self._calibration.chance(place, estimate))
            self._calibration.take(place, estimate, hit)
        if accepted:
            standing.wait, standing.due = 1, self._now
        if self._choice is not None:
            self._choice.accepted += accepted

    def timed(self, tokens: int, seconds: float, waited: float) -> None:
        """A step has ended. `seconds` count from the end of the step before it, or from its own beginning where there
        was nothing to do. `waited`: of these, how long nothing was computed because it could be planned only after
        that end; 0 where it overlapped the step before it, or where steps never do."""
        self._now += 1
        choice, self._choice = self._choice, None
        if not self.plain:
            self._purse = _CREDIT * seconds
        elif self._now == 16:
            self._purse = min(self._purse, _CREDIT * self.plain.seconds(tokens))
        self._purse += _SPENT * min(seconds, 2 * self.plain.seconds(tokens))
        if waited:
            self._waits.append((waited, 0))
        if choice is None:
            self.drafted.pass_by()
            if not waited or not self.plain:
                self.plain.observe(tokens, seconds)
            return
        decoding, beside, drafts = choice.decoding, choice.beside, choice.drafts
        plain = self.plain.seconds(decoding + beside)
        self._row += waited > 0 or drafts > 0
        if drafts:
            if beside:
                self.plain.observe(tokens, max(seconds - self._gap, 0))
                self.drafted.pass_by()
            else:
                self.drafted.observe(tokens, min(seconds, 2 * self.drafted.seconds(tokens)))
                self.plain.pass_by()
        else:
            self.drafted.pass_by()
            self.plain.pass_by()
            if not beside:
                self._gaps.append((seconds - plain, 0))
        self._gap = Typical.of(self._waits).seconds if self._waits else 0.0
        if len(self._gaps) >= 16:
            self._gap = max(self._gap, Typical.of(self._gaps).seconds)
        if choice.trial:
            saved = choice.accepted * self.plain.seconds(decoding) / decoding
            self._purse += saved - self._extra(decoding, beside, max(drafts, 1))
        self._purse = max(min(self._purse, _SAVED * plain), -_CREDIT * plain)

    def forget(self, request: Request) -> None:
        """The request has ended."""
        self._standings.pop(request.id, None)
