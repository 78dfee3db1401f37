"""Which drafts are worth computing: those that bring more tokens a second than the step would without them."""

from collections.abc import Sequence
from dataclasses import dataclass

from quire_engine.request import Request
from quire_engine.speculation.chances import Chances
from quire_engine.speculation.costs import Costs
from quire_engine.speculation.draft import Draft

_HOPELESS = 0.02  # a draft less likely to be reached and accepted is not looked at
_RAREST = 32  # steps between two probes of a request, at most
_SPENT = 0.006  # of all time, what may be lost to finding out
_SHARE = 0.1  # the same, of the time that drafts save
_CREDIT = 1.5  # steps that may be lost to begin with
_SAVED = 6.0  # steps' time that is saved up at most
_DEBT = 1.5  # steps' time that is owed at most
_FREE = 0.002  # of a step: what costs no more costs nothing
_MEMORY = 16  # steps asked about over which is averaged what asking brings
_HOPE = 0.5  # of a step: the most that is expected of asking, so that hope is soon lost
_FIRST, _CONTROL = 8, 96  # steps asked about, after which what plain ones take is measured again: at first, later on
_DOUBTED = 4  # the same where what drafts seem to save may be noise
_CONTROLS = 2  # plain steps for it: the first cannot overlap the one before it


@dataclass(slots=True)
class _Choice:
    """What was chosen for a step and why."""

    decoding: int
    beside: int
    trial: bool  # what it saves is uncertain by its size or by the noise
    probed: set[int]  # requests
    accepted: int = 0
    proved: int = 0  # of these, drafts of probed requests


class Value:
    """Weighs the drafts of a step against what they cost, after TurboSpec (Liu et al., arXiv 2406.14066), which
    maximizes goodput: accepted tokens a second. One thread; what it says is a function of what it was told.

    Drafts are computed that are expected to pay. What it takes to find out whether they would (asking drafters, drafts
    of requests that had no luck, steps of sizes never seen) is paid from a purse, into which a share of all time goes.
    So little is lost where drafts are never any good, whatever they seem to be.

    For a step: `worth_asking`; where it says yes, `choose` when the step before has ended; when the step has ended,
    `learn` for each request that had drafts computed, then `timed`.
    """

    def __init__(self, most: int) -> None:
        """`most`: drafts of a request."""
        self.most = most
        self.costs = Costs()
        self._chances = Chances()
        self._now = 0  # counts steps
        self._begun = False
        self._purse = 0.0  # seconds
        self._gain = 0.0  # of asking, of late: time saved, in steps
        self._unlucky = -2  # the last step asked about in which no draft was accepted
        self._doubted = False  # what the last drafts seemed to save may be noise
        self._row = 0  # steps asked about since plain ones were last measured
        self._until = _FIRST  # how many there may be
        self._control = 0  # plain steps still to be made
        self._choice: _Choice | None = None

    # ---- before a step ----------------------------------------------------------------------------------------------

    def worth_asking(self, decoding: int, beside: int) -> bool:
        """Whether drafters are to be asked, for which the step before has to end, in a step of so many certain tokens
        and so many of prompts."""
        costs = self.costs
        if not decoding or not costs.knows(decoding, beside):
            return False
        if not self._begun:
            self._begun, self._purse = True, _CREDIT * costs.plain.seconds(decoding)
        if self._control:
            self._control -= 1
            return False
        if self._row >= (_DOUBTED if self._doubted else self._until):
            self._row, self._control, self._until = 0, _CONTROLS - 1, min(2 * self._until, _CONTROL)
            return False
        if self._gain <= 0:
            if self._now <= self._unlucky + 1:  # so that plain steps are measured meanwhile
                return False
            needed = 2 * (costs.gap + costs.extra(decoding, beside, 1))
            if self._purse < min(needed, _SAVED / 2 * costs.plain.seconds(decoding + beside)):
                return False
        return self._could_pay(decoding, beside)

    def _could_pay(self, decoding: int, beside: int) -> bool:
        """Whether drafts would if all were accepted."""
        worth = self.costs.worth(decoding)
        drafts = 1
        while drafts <= self.most * decoding:
            if self.costs.extra(decoding, beside, drafts) < drafts * worth:
                return True
            drafts *= 2
        return False

    def choose(
        self, requests: Sequence[Request], drafts: Sequence[Draft], decoding: int, beside: int, room: int
    ) -> list[int]:
        """How many of each request's drafts to compute, `room` in all at most. The step has `decoding` certain tokens,
        one of each of these requests among them, and `beside` ones of prompts."""
        costs = self.costs
        known, most = costs.reach(decoding, beside)
        known, most = min(known, room), min(most, room)
        while most > known and costs.extra(decoding, beside, most) > self._purse:
            most = max(known, most // 2)
        candidates = self._candidates(requests, drafts)[:most]
        number, saved = self._best(candidates, decoding, beside)
        gain = -sum(chance for chance, _ in candidates[:number])
        self._doubted = bool(number) and not beside and saved < costs.doubt(decoding, number, gain)
        if self._doubted and costs.extra(decoding, beside, number) > self._purse:
            number, saved, self._doubted = 0, 0.0, False
        counts = [0] * len(requests)
        for _, index in candidates[:number]:
            counts[index] += 1
        probed = self._probes(requests, drafts, counts, (decoding, beside, number), most - number)
        for index in probed:
            counts[index] = 1
        if not number:
            saved = -costs.gap
        trial = not beside and (number + len(probed) > known or self._doubted)
        if not trial:  # which is paid by its outcome
            self._purse += _SHARE * saved if saved > 0 else saved if self._gain <= 0 else 0.0
            if probed:
                self._purse -= max(0.0, costs.price(decoding, beside, number, len(probed)))
        gain = saved / costs.plain.seconds(decoding + beside)
        self._gain = min(self._gain + (gain - self._gain) / _MEMORY, _HOPE)
        self._choice = _Choice(decoding, beside, trial, {requests[index].id for index in probed})
        return counts

    def _candidates(self, requests: Sequence[Request], drafts: Sequence[Draft]) -> list[tuple[float, int]]:
        """Every draft that is not hopeless, the likeliest first: minus the chance that it is reached and accepted, and
        whose it is. Those of one request come in their order, for their chances fall."""
        found: list[tuple[float, int]] = []
        for index, (request, draft) in enumerate(zip(requests, drafts, strict=True)):
            if draft.chances:
                found.extend(
                    (-chance, index) for chance in self._chances.reached(request, draft, _HOPELESS)[: self.most]
                )
        found.sort()
        return found

    def _best(self, candidates: list[tuple[float, int]], decoding: int, beside: int) -> tuple[int, float]:
        """How many of the candidates pay most, and the seconds that they save. A token drawn now saves what it would
        take in a step of its own kind without prompts beside it; how long that is, the first pass finds."""
        costs = self.costs
        gains, gain = [], 0.0
        for number, (chance, _) in enumerate(candidates, 1):
            gain -= chance
            if number <= 16 or number % (number // 8) == 0 or number == len(candidates):
                gains.append((number, gain))
        plain, worth = costs.plain.seconds(decoding), costs.worth(decoding)
        rate, best, saved = 1 / worth, 0, 0.0
        for number, gain in gains:
            extra = costs.extra(decoding, 0, number)
            found = (decoding + gain) / (plain + extra)
            if found > rate:
                rate, best, saved = found, number, gain * worth - extra
        if not beside:
            return best, saved
        best, saved = 0, 0.0
        for number, gain in gains:
            found = gain / rate - costs.extra(decoding, beside, number)
            if found > saved:
                best, saved = number, found
        return best, saved

    def _probes(
        self,
        requests: Sequence[Request],
        drafts: Sequence[Draft],
        counts: Sequence[int],
        step: tuple[int, int, int],
        room: int,
    ) -> list[int]:
        """Of which requests one draft is computed to find out what comes of it, in a step of so many certain tokens,
        prompts' and drafts. A request whose probes fail is probed ever more rarely, unless it costs nothing."""
        price, chosen = self.costs.price, step[2]
        free = price(*step, 1) - (0.0 if chosen else self.costs.gap) <= _FREE * self.costs.plain.seconds(step[0])
        found: list[int] = []
        for index, request in enumerate(requests):
            if counts[index] or not drafts[index].tokens:
                continue
            standing = self._chances.standing(request)
            if standing.due > self._now and not free:
                continue
            if len(found) >= room or price(*step, len(found) + 1) > self._purse / 2:
                break
            standing.due = self._now + standing.wait
            standing.wait = min(2 * standing.wait, _RAREST)
            found.append(index)
        return found

    # ---- after it ---------------------------------------------------------------------------------------------------

    def learn(self, request: Request, draft: Draft, computed: int, accepted: int) -> None:
        """Of the draft so many were computed, and so many accepted."""
        self._chances.learn(request, draft, computed, accepted)
        if accepted:
            standing = self._chances.standing(request)
            standing.wait, standing.due = 1, self._now
        if self._choice is not None:
            self._choice.accepted += accepted
            if request.id in self._choice.probed:
                self._choice.proved += accepted

    def timed(self, tokens: int, seconds: float, waited: float) -> None:
        """A step of so many computed tokens has ended. `seconds` count from the end of the step before it, or from its
        own beginning where there was nothing to do. `waited`: of these, how long nothing was computed because it could
        be planned only after that end; 0 where it overlapped, or where steps never do."""
        costs = self.costs
        self._now += 1
        choice, self._choice = self._choice, None
        decoding, beside = (choice.decoding, choice.beside) if choice is not None else (tokens, 0)
        drafts = max(0, tokens - decoding - beside)
        costs.observe(decoding, beside, drafts, seconds, waited, choice is not None)
        plain = costs.plain.seconds(decoding + beside)
        self._purse += _SPENT * min(seconds, 2 * plain)
        if choice is not None:
            self._row += waited > 0 or drafts > 0
            if not choice.accepted:
                self._unlucky = self._now
            if choice.trial:
                saved = choice.accepted * costs.worth(decoding) - costs.extra(decoding, beside, drafts)
                saved -= costs.doubt(decoding, drafts, choice.accepted)  # few steps of a size seem cheap by luck
                self._purse += min(saved, _SHARE * saved)
            else:
                self._purse += choice.proved * costs.worth(decoding)
        self._purse = max(min(self._purse, _SAVED * plain), -_DEBT * plain)

    def forget(self, request: Request) -> None:
        """The request has ended."""
        self._chances.forget(request)
