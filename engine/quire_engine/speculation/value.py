"""Which drafts are worth computing: those that bring more tokens a second than the step would without them."""

from collections.abc import Sequence
from dataclasses import dataclass

from quire_engine.request import Request
from quire_engine.speculation.chances import Chances
from quire_engine.speculation.costs import Costs
from quire_engine.speculation.draft import Draft

_HOPELESS = 0.02  # a draft less likely to be reached and accepted is not looked at
_CREDIT = 1.0  # plain steps whose time drafts may lose before they pause
_SAVED = 3.0  # plain steps whose time is saved up at most, to be lost before that
_PAUSE, _LONGEST = 32, 1024  # steps without drafts: the first time, and at most
_FIRST, _CONTROL = 16, 128  # steps with drafts, after which what plain ones take is measured again: at first, later on


@dataclass(slots=True)
class _Choice:
    """What was chosen for a step, and what has come of it."""

    rows: int
    certain: int
    drafts: int = 0
    accepted: int = 0


class Value:
    """Weighs the drafts of a step against what they cost, after TurboSpec (Liu et al., arXiv 2406.14066), which
    maximizes goodput: accepted tokens a second. One thread; what it says is a function of what it was told.

    Estimates may be wrong, and machines are disturbed. So it also keeps account of what drafts have really saved:
    where they have lost the time of a plain step they pause, each time for longer, until they have saved as much.

    A step is described by its `rows`, requests of which it draws a token, and its `certain` tokens, which it computes
    whether there are drafts or not (more than its rows where some are computed again).
    """

    def __init__(self, most: int) -> None:
        """`most`: drafts of a request."""
        self.most = most
        self.costs = Costs()
        self._chances = Chances()
        self._saved = 0.0  # seconds
        self._paused, self._pause = 0, _PAUSE  # steps: still to go, of the next time
        self._row, self._until = 0, _FIRST  # steps since a plain one was measured, and how many there may be
        self._choice: _Choice | None = None

    # ---- before a step ----------------------------------------------------------------------------------------------

    def possible(self, rows: int, certain: int) -> bool:
        """Whether drafters are to be asked for drafts of a step at all."""
        if self._paused or self._row >= self._until or not self.costs.plain.knows(certain):
            return False
        worth, drafts = self.costs.plain.seconds(certain) / rows, 1
        while drafts <= self.most * rows:
            if self.costs.extra(certain, drafts) < drafts * worth:
                return True
            drafts *= 2
        return False

    def worth_waiting(
        self, requests: Sequence[Request], drafts: Sequence[Draft], rows: int, certain: int, *, unknown: bool
    ) -> bool:
        """Whether drafts are likely enough to pay that the step waits for the one in flight to end.

        `drafts`: as they are seen now. `unknown`: the first of each stands for the token in flight, and if it is right
        the others will be the step's.
        """
        behind = [Draft(draft.tokens[unknown:], draft.chances[unknown:]) for draft in drafts]
        found = self._candidates(requests, behind)
        number, saved = self._best(found, rows, certain)
        if not number:
            return False
        hope = 1.0
        if unknown:
            chosen = [index for _, index in found[:number]]
            hope = sum(self._chances.first(requests[index], drafts[index]) for index in chosen) / number
        return hope * (saved + self.costs.gap) > self.costs.gap

    def choose(
        self, requests: Sequence[Request], drafts: Sequence[Draft], rows: int, certain: int, room: int
    ) -> list[int]:
        """How many of each request's drafts to compute, `room` in all at most."""
        found = self._candidates(requests, drafts)[: min(room, self.costs.reach(certain))]
        number, _ = self._best(found, rows, certain)
        counts = [0] * len(requests)
        for _, index in found[:number]:
            counts[index] += 1
        self._choice = _Choice(rows, certain)
        return counts

    def _candidates(self, requests: Sequence[Request], drafts: Sequence[Draft]) -> list[tuple[float, int]]:
        """Every draft that is not hopeless, the likeliest first: minus the chance that it is reached and accepted, and
        whose it is. Those of one request come in their order, for their chances fall."""
        found: list[tuple[float, int]] = []
        for index, (request, draft) in enumerate(zip(requests, drafts, strict=True)):
            found.extend((-chance, index) for chance in self._chances.reached(request, draft, _HOPELESS)[: self.most])
        found.sort()
        return found

    def _best(self, found: Sequence[tuple[float, int]], rows: int, certain: int) -> tuple[int, float]:
        """How many drafts pay most, of which the likeliest come first, and the seconds that they save."""
        plain = self.costs.plain.seconds(certain)
        best, saved, rate, gain = 0, 0.0, rows / plain, 0.0
        for number, (chance, _) in enumerate(found, 1):
            gain -= chance
            if number <= 16 or number % (number // 8) == 0 or number == len(found):
                extra = self.costs.extra(certain, number)
                if (rows + gain) / (plain + extra) > rate:
                    best, rate, saved = number, (rows + gain) / (plain + extra), gain * plain / rows - extra
        return best, saved

    # ---- after it ---------------------------------------------------------------------------------------------------

    def compare(self, request: Request, draft: Draft, right: bool) -> None:
        """Whether the first token of a draft that was not computed would have been right."""
        self._chances.learn(request, draft, 1, int(right))

    def learn(self, request: Request, draft: Draft, computed: int, accepted: int) -> None:
        """Of the draft so many were computed, and so many accepted."""
        self._chances.learn(request, draft, computed, accepted)
        if self._choice is not None:
            self._choice.drafts += computed
            self._choice.accepted += accepted

    def timed(self, tokens: int, prompts: int, seconds: float, waited: float) -> None:
        """A step of so many computed tokens, so many of them of prompts, has ended. `seconds` count from the end of the
        step before it, or from its own beginning where there was nothing to do. `waited`: of these, how long nothing
        was computed because it could be planned only after that end; 0 where it overlapped, or where steps never do."""
        self._chances.now += 1
        self._paused = max(0, self._paused - 1)
        choice, self._choice = self._choice, None
        drafts = choice.drafts if choice is not None else 0
        off = self.costs.plain.off(seconds, tokens)
        seconds = self.costs.observe(tokens, drafts, seconds, waited)
        if not prompts:
            self._row += 1
            if not drafts and not waited:
                if off:
                    self._until = _FIRST
                elif self._row > self._until:
                    self._until = min(2 * self._until, _CONTROL)
                self._row = 0
        if choice is not None and not prompts:
            self._account(choice, seconds)

    def _account(self, choice: _Choice, seconds: float) -> None:
        """A step took so long about which drafters were asked."""
        plain = self.costs.plain.seconds(choice.rows)
        self._saved += plain * (1 + choice.accepted / choice.rows) - seconds
        if self._saved > _CREDIT * plain:
            self._saved, self._pause = min(self._saved, _SAVED * plain), _PAUSE
        elif self._saved < -_CREDIT * plain:
            self._saved, self._paused, self._until = 0.0, self._pause, _FIRST
            self._pause = min(2 * self._pause, _LONGEST)

    def forget(self, request: Request) -> None:
        """The request has ended."""
        self._chances.forget(request)
