"""Whose turn it is to draw a token in a step, between tenants of a class of priority. Pure bookkeeping.

While a tenant lacks tokens of prompts, requests of others that would draw a token give way, as many as it takes for the
counters (fairness.py) to come to one level within the plan, whose tokens count at once. Without that a flood of
requests that draw would leave the prompts of others next to nothing of a step.

Whoever is behind catches up with at most half of a step's tokens, together with all that are; the other half is shared
by weight. So no stream stands still: where a class has T tokens of a step, a tenant of weight w, among tenants of W in
all, draws T w / 4 W of them, less one, but at least 1; or as many as it can. Who was left out goes first, in the order
in which they were: of n streams of a tenant that draws k a step, each has its token within n / k steps, rounded up.
"""

from bisect import bisect_right
from collections.abc import Container
from itertools import chain, islice

from quire_engine.fairness import OUTPUT_PRICE, Account, Accounts
from quire_engine.request import Request


class _Wants:
    """What a tenant could have of a step: first the tokens that its requests would draw, then those of its prompts."""

    def __init__(self, account: Account) -> None:
        self.account = account
        self.drawing: list[Request] = []
        self.prompts = 0  # tokens
        self.start = account.counter  # from which it is served

    def draws(self, level: int) -> int:
        """How many it draws until its counter is there; at least 1."""
        most = max(1, (level - self.start) // (OUTPUT_PRICE * self.account.price))
        return min(len(self.drawing), most)

    def tokens(self, level: int) -> int:
        """All that it has of the step until then."""
        draws = self.draws(level)
        if draws < len(self.drawing):
            return draws
        rest = (level - self.start) // self.account.price - OUTPUT_PRICE * draws
        return draws + min(self.prompts, max(0, rest))

    def left_out(self, level: int, held: Container[Request]) -> list[Request]:
        """Those that draw no token until then, whose wait is the shortest: they are `held` since then, or were not."""
        draws = self.draws(level)
        if draws == len(self.drawing):
            return []
        return sorted(self.drawing, key=lambda one: (one not in held, one.waiting_since, one.arrival, one.id))[draws:]


def _level(wants: list[_Wants], room: int) -> int:
    """The counter to which `room` tokens of a step bring those that want more of it."""
    top = max(one.start for one in wants if one.drawing)
    for one in wants:
        one.prompts = min(one.prompts, room)
        one.start = max(one.start, top - room // 2 // (len(wants) - 1) * one.account.price)
    least = min(one.start for one in wants)
    most = max(one.start + (OUTPUT_PRICE * len(one.drawing) + one.prompts) * one.account.price for one in wants)
    levels = range(least, most + 1, min(one.account.price for one in wants))
    place = bisect_right(levels, room, key=lambda level: sum(one.tokens(level) for one in wants))
    return levels[max(0, place - 1)]


class Turns:
    """Asked before each plan. Where no tenants compete, or none lacks tokens of prompts, this costs a step nothing."""

    def __init__(self, accounts: Accounts, *, give_way: bool) -> None:
        """`give_way`: whether any may. None may with recurrent states: who begins with one that another left holds it
        until the plan is made, so that whoever runs has to come first, to find a page for its own."""
        self._accounts = accounts
        self._give_way = give_way
        self.had_prompts = False  # the last plan, or it left some out: there may be more

    def take(
        self, running: list[Request], budget: int, rows: int, held: Container[Request]
    ) -> tuple[list[Request], list[Request]]:
        """Of those that run who goes on in a step of `budget` tokens; and those that would draw a token, whose turn it
        is not. `rows`: that those that wait may have; `held`: whom the last plan left out.

        It is not known here what the cache has of what waits, nor whether there are pages, and what is computed again
        after drafts proved wrong is not looked at. Tokens that are left over are for the latter after all."""
        if not (self._give_way and self._accounts.contested and (rows or self.had_prompts)):
            return running, []
        self._accounts.settle()
        classes: dict[int, dict[Account, _Wants]] = {}
        self._look_at_running(running, classes)
        if rows:
            self._look_at_waiting(min(rows, budget), classes)
        room = budget - sum(len(one.drawing) for line in classes.values() for one in line.values())
        for _, line in sorted(classes.items()):
            wants = list(line.values())
            drawing, prompts = sum(len(one.drawing) for one in wants), sum(one.prompts for one in wants)
            if prompts > max(
                room, 0
            ):  # of worse classes none give way: prompts of this one would have what they gave up
                if not drawing or len(wants) == 1 or (room < 0 and len(classes) > 1):
                    break
                level = _level(wants, drawing + room)
                left = dict.fromkeys(chain.from_iterable(one.left_out(level, held) for one in wants))
                return [request for request in running if request not in left], list(left)
            room -= prompts
        return running, []

    def _look_at_running(self, running: list[Request], classes: dict[int, dict[Account, _Wants]]) -> None:
        for request in running:
            if not request.at_last_token:
                wants = self._wants(self._accounts.of(request), classes)
                if request.draws_next:
                    wants.drawing.append(request)
                else:
                    wants.prompts += request.num_uncomputed

    def _look_at_waiting(self, most: int, classes: dict[int, dict[Account, _Wants]]) -> None:
        """`most`: requests that a step may take in."""
        for line in self._accounts.lines.values():
            for account in line.present.values():
                if account.waiting:
                    first = islice(account.waiting.values(), most)
                    self._wants(account, classes).prompts += sum(len(request.tokens) for request in first)

    def _wants(self, account: Account, classes: dict[int, dict[Account, _Wants]]) -> _Wants:
        of_class = classes.setdefault(account.line.kind, {})
        if account not in of_class:
            of_class[account] = _Wants(account)
        return of_class[account]
