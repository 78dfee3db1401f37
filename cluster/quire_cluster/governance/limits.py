"""A gateway's side of what tenants may have: lets requests in, or says which limit is reached and for how long."""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from quire_engine.errors import ContextTooLong, InvalidParameter, LimitReached

from quire_cluster.governance.callers import Tenant, TenantLimits
from quire_cluster.policies.quota import (
    Ask,
    Grants,
    Leased,
    LeasedRate,
    LeasedSlots,
    TenantAsk,
    TenantGrant,
    Want,
)

log = logging.getLogger(__name__)
_PATIENCE = 0.04  # seconds that a request waits for the controller
_LATE = 0.01  # seconds more: where this loop was busy for that long, the answer may have come, and is heard now
_PACE = 0.01  # seconds between two asks: what comes meanwhile is one
_RETRY = 0.5  # seconds until a controller that did not answer is asked again
_BEAT = 1.0  # seconds between asks while anything is held; what was not needed for so long is given back
_QUIET = 4.0  # seconds between asks while nothing is: how many gateways there are, the share goes by
_SOON = 1.0  # seconds until a refused request should come again, where nobody knows when there is room
_USUAL_ANSWER = 1024  # tokens that are reserved for an answer that may be as long as it likes
_UNLIMITED = TenantLimits()
_WORDS = {
    "requests_per_minute": "requests a minute",
    "tokens_per_minute": "tokens a minute",
    "concurrent_requests": "requests at a time",
    "monthly_tokens": "tokens a month",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cost:
    """Of a request."""

    tokens: int  # that it may come to
    longest_answer: int


@dataclass(eq=False, slots=True)
class _Waiter:
    """A request that the controller is asked for."""

    cost: _Cost
    decided: "asyncio.Future[Permit | None]"  # None: there is not enough


class Limiter:
    """`admit` lets a request in. `run` is a part that lasts as long as the gateway: it talks to the controller, each
    time about all that requests need.

    What a gateway holds of a limit it decides about by itself. Where that is not enough a request waits for the
    controller, 50 ms at most; then, and until the controller answers again, the gateway goes on with its share of the
    limit. How much is let in: see `policies.quota`.

    The tokens that a request may come to are reserved. Whoever has its permit says what it came to: the rest is given
    back, of which this gateway itself may use a 32nd of the limit at once. Where a request gives no max_tokens, and its
    tenant has no longest answer, 1024 tokens are reserved for an answer: those that run on are charged afterwards, so
    each that runs may once use more than the limit of tokens a minute, by what the context has beyond.

    The month's tokens are those that `used` tells, and those that are reserved here. Several gateways may exceed them
    by what the others reserved, and used since `used` was last read.
    """

    def __init__(
        self,
        name: str,
        lease: Callable[[Ask], Awaitable[Grants]],
        *,
        used: Callable[[str], int],
        revision: Callable[[], int],
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`name`: of the gateway, another one each time that it is started. `lease`: asks the controller; whatever it
        raises means that it is away. `used`: a tenant's tokens of this month in UTC, with those of this gateway that
        are nowhere else yet. `revision`: of the tenants that `admit` is given; it grows. `wall`: seconds since 1970.
        Needs a running loop, whose clock it goes by."""
        self.alone = False  # the controller does not answer
        self._name = name
        self._lease = lease
        self._used = used
        self._revision = revision
        self._wall = wall
        self._clock = asyncio.get_running_loop().time
        self._gateways = 1
        self._number = 0
        self._accounts: dict[str, _Account] = {}
        self._due: dict[_Account, None] = {}  # of which there is something to say
        self._news = asyncio.Event()
        self._beat = self._clock() + _BEAT
        self._quiet_until = self._beat

    async def admit(
        self, tenant: Tenant, prompts: Sequence[int], answer: int, *, given: bool, choices: int = 1
    ) -> "Permit":
        """Lets a request in. `prompts`: the tokens of each of its prompts. `answer`: tokens of the longest answer: the
        request's max_tokens where that is `given`, else what the context leaves; 0 where there is none. `choices`:
        answers to each prompt. Raises InvalidParameter for what can never be, LimitReached for what cannot be now."""
        if tenant.limits == _UNLIMITED:
            return Permit(None, _Cost(tokens=0, longest_answer=answer))
        cost = _cost(tenant.limits, prompts, answer, given=given, choices=choices)
        account = self._accounts.get(tenant.name)
        if account is None:
            account = self._accounts[tenant.name] = _Account(tenant.name, self._clock, self._say, self._used)
        account.follow(tenant.limits, self._revision(), self._gateways)
        self._check_month(account, cost)
        permit = account.take(cost, alone=self.alone) if self.alone or not account.waiting else None
        if permit is not None:
            return permit
        if not self.alone and not account.exhausted(cost):
            return await self._ask_for(account, cost)
        if self.alone:
            self._say(account)
        raise account.refusal(cost, alone=self.alone)

    def _check_month(self, account: "_Account", cost: _Cost) -> None:
        if account.exceeds_month(cost):
            now = self._wall()
            raise account.reached("monthly_tokens", _next_month(now) - now)

    async def _ask_for(self, account: "_Account", cost: _Cost) -> "Permit":
        loop = asyncio.get_running_loop()
        waiter = _Waiter(cost, loop.create_future())
        account.wait(waiter)
        self._say(account)
        timer = loop.call_later(_PATIENCE, loop.call_later, _LATE, self._give_up, account, waiter)
        try:
            permit = await waiter.decided
        except asyncio.CancelledError:  # its client has left, maybe when it was just let in
            if not waiter.decided.cancelled() and (unused := waiter.decided.result()) is not None:
                unused.settle(0)
                unused.release()
            raise
        finally:
            timer.cancel()
            account.leave(waiter)
        if permit is None:
            self._check_month(account, cost)
            raise account.refusal(cost, alone=self.alone)
        return permit

    def _give_up(self, account: "_Account", waiter: _Waiter) -> None:
        if not waiter.decided.done():
            self._lost(f"it took more than {_PATIENCE + _LATE:g} s")
            account.decide([waiter], alone=True)

    # ---- the controller -------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """For ever. Now and then it asks for nothing: how many gateways there are."""
        while True:
            await self._talk()
            await asyncio.sleep(_RETRY if self.alone else _PACE)
            await self._something_to_say()

    def _say(self, account: "_Account") -> None:
        self._due[account] = None
        self._news.set()

    async def _something_to_say(self) -> None:
        while True:
            try:
                async with asyncio.timeout_at(self._beat):
                    await self._news.wait()
            except TimeoutError:
                pass
            self._news.clear()
            if (now := self._clock()) >= self._beat:
                self._beat = now + _BEAT
                self._due |= {account: None for account in self._accounts.values() if not account.silent}
            if self._due or now >= self._quiet_until:
                return

    async def _talk(self) -> None:
        """One ask, with all that there is to say."""
        due, self._due = list(self._due), {}
        waiting = {account: list(account.waiting) for account in due}
        self._number += 1
        self._quiet_until = self._clock() + _QUIET
        tenants = {account.name: account.ask() for account in due}
        ask = Ask(gateway=self._name, number=self._number, gateways=self._gateways, tenants=tenants)
        try:
            grants = await self._lease(ask)
        except Exception as error:  # whatever it is, the controller is away; requests go by the share meanwhile
            self._lost(f"{type(error).__name__}: {error}")
            self._due |= dict.fromkeys(due)
            for account in self._accounts.values():
                account.decide(list(account.waiting), alone=True)
            return
        if self.alone:
            log.info("the controller answers: limits of tenants are leased again")
        self.alone, self._gateways = False, grants.gateways
        for account in due:
            account.hear(grants.tenants[account.name], grants.gateways)
            account.decide(waiting[account], alone=False)
            if account.waiting or account.surplus:
                self._say(account)

    def _lost(self, why: str) -> None:
        if not self.alone:
            log.warning("the controller leases nothing (%s): tenants have this gateway's share of their limits", why)
        self.alone = True


class _Account:
    """What a tenant has here."""

    def __init__(
        self, name: str, clock: Callable[[], float], say: "Callable[[_Account], None]", used: Callable[[str], int]
    ) -> None:
        """`say`: there is something that the controller should hear. `used`: a tenant's tokens of this month."""
        self.name = name
        self._used = used
        self.limits = _UNLIMITED
        self.requests: LeasedRate | None = None
        self.tokens: LeasedRate | None = None
        self.slots: LeasedSlots | None = None
        self.reserved = 0  # tokens, of requests that run
        self.waiting: dict[_Waiter, None] = {}
        self._waiting_tokens = 0
        self._running = 0
        self._clock = clock
        self._say = say
        self._came = clock()  # the last request
        self._revision = 0

    def follow(self, limits: TenantLimits, revision: int, gateways: int) -> None:
        """A request comes, under these limits: operators may have changed them."""
        now = self._clock()
        self._came, self._revision = now, revision
        if limits is self.limits:
            return
        self.limits = limits
        self.requests = _rate(self.requests, limits.requests_per_minute, now, gateways)
        self.tokens = _rate(self.tokens, limits.tokens_per_minute, now, gateways)
        most = limits.concurrent_requests
        if most is None:
            self.slots = None
        elif self.slots is None:
            self.slots = LeasedSlots(most, used=self._running, gateways=gateways)
        else:
            self.slots.resize(most, now)

    @property
    def _leased(self) -> list[Leased]:
        return [leased for leased in (self.requests, self.tokens, self.slots) if leased is not None]

    @property
    def silent(self) -> bool:
        """There is nothing that the controller has to hear now and then."""
        return all(leased.silent for leased in self._leased)

    @property
    def surplus(self) -> bool:
        """There is something to give back."""
        return any(leased.surplus for leased in self._leased)

    # ---- requests -------------------------------------------------------------------------------------------------

    def _parts(self, cost: _Cost) -> list[tuple[str, Leased, int]]:
        """The limits that a request counts for, and how much."""
        found: list[tuple[str, Leased | None, int]] = [
            ("concurrent_requests", self.slots, 1),
            ("requests_per_minute", self.requests, 1),
            ("tokens_per_minute", self.tokens, cost.tokens),
        ]
        return [(name, leased, amount) for name, leased, amount in found if leased is not None]

    def exceeds_month(self, cost: _Cost) -> bool:
        """With what is used and reserved."""
        budget = self.limits.monthly_tokens
        return budget is not None and self._used(self.name) + self.reserved + cost.tokens > budget

    def take(self, cost: _Cost, *, alone: bool) -> "Permit | None":
        """Of what is held, and of the share where the gateway is alone; None: there is not enough, or of the month's
        tokens, which others may have got that waited before."""
        if self.exceeds_month(cost):
            return None
        now = self._clock()
        parts = self._parts(cost)
        for _, leased, amount in parts:
            if (leased.share(now) if alone else leased.held) < amount:
                return None
        for _, leased, amount in parts:
            leased.use(amount, now)
            if leased.low:
                self._say(self)
        self._running += 1
        self.reserved += cost.tokens
        return Permit(self, cost)

    def exhausted(self, cost: _Cost) -> bool:
        """There is not enough for one request more than those that wait, as the controller just said."""
        now = self._clock()
        return any(leased.exhausted(amount + self._waits_for(leased), now) for _, leased, amount in self._parts(cost))

    def _waits_for(self, leased: Leased) -> int:
        return self._waiting_tokens if leased is self.tokens else len(self.waiting)

    def wait(self, waiter: _Waiter) -> None:
        """The controller is asked for it."""
        self.waiting[waiter] = None
        self._waiting_tokens += waiter.cost.tokens

    def leave(self, waiter: _Waiter) -> None:
        """It waits no more."""
        del self.waiting[waiter]
        self._waiting_tokens -= waiter.cost.tokens

    def decide(self, waiters: Sequence[_Waiter], *, alone: bool) -> None:
        """Those that still wait, the first first."""
        for waiter in waiters:
            if waiter in self.waiting and not waiter.decided.done():
                waiter.decided.set_result(self.take(waiter.cost, alone=alone))

    def ended(self, cost: _Cost) -> None:
        """A request."""
        self._running -= 1
        self.reserved -= cost.tokens
        if self.slots is not None:
            self.slots.use(-1, self._clock())
            self.returned(self.slots)

    def settle(self, tokens: LeasedRate, difference: int) -> None:
        """A request came to so much more than was reserved."""
        tokens.use(difference, self._clock())
        self.returned(tokens)

    def returned(self, leased: Leased) -> None:
        """Something may be given back, or owed."""
        if leased.surplus or leased.held < 0:
            self._say(self)

    # ---- the controller -------------------------------------------------------------------------------------------

    def ask(self) -> TenantAsk:
        """What it needs for all that wait."""
        now = self._clock()
        comes = now - self._came < _BEAT

        def of(leased: Leased | None) -> Want | None:
            return leased.ask(self._waits_for(leased), now, more_to_come=comes) if leased is not None else None

        return TenantAsk(
            revision=self._revision, requests=of(self.requests), tokens=of(self.tokens), slots=of(self.slots)
        )

    def hear(self, grant: TenantGrant, gateways: int) -> None:
        """What was answered, to limits as they were when this gateway asked."""
        now = self._clock()
        for leased, one in ((self.requests, grant.requests), (self.tokens, grant.tokens), (self.slots, grant.slots)):
            if leased is not None and one is not None:
                leased.hear(one, gateways, now)

    # ---- what is told to callers ----------------------------------------------------------------------------------

    def refusal(self, cost: _Cost, *, alone: bool) -> LimitReached:
        """Says which limit keeps a request out for the longest."""
        now = self._clock()
        waits = [
            (leased.wait(amount, now, alone=alone) or _SOON, name)
            for name, leased, amount in self._parts(cost)
            if (leased.share(now) if alone else leased.held) < amount
            or (not alone and leased.exhausted(amount + self._waits_for(leased), now))
        ]
        wait, limit = max(waits, default=(_SOON, "concurrent_requests"))
        return self.reached(limit, wait)

    def reached(self, limit: str, wait: float) -> LimitReached:
        """Of the limit, by its name in `TenantLimits`."""
        return LimitReached(
            f"tenant {self.name} may have {getattr(self.limits, limit)} {_WORDS[limit]}, and this would be more; "
            f"try again in {duration(wait)}",
            limit=limit,
            retry_after=wait,
            headers=self.headers(),
        )

    def headers(self) -> dict[str, str]:
        """OpenAI's, of the limits that there are. Of other gateways they know what was heard last."""
        now, said = self._clock(), {}
        for what, leased in (("requests", self.requests), ("tokens", self.tokens)):
            if leased is not None:
                said[f"x-ratelimit-limit-{what}"] = str(leased.capacity)
                said[f"x-ratelimit-remaining-{what}"] = str(int(leased.remaining(now)))
                said[f"x-ratelimit-reset-{what}"] = duration(leased.full(now))
        return said


class Permit:
    """Of a request that was let in. Whoever has it releases it, however the request ended."""

    def __init__(self, account: _Account | None, cost: _Cost) -> None:
        """`account`: None, of a tenant without limits."""
        self.longest_answer = cost.longest_answer  # tokens that each answer may have
        self._account = account
        self._cost = cost
        self._tokens = account.tokens if account is not None else None
        self._charged = cost.tokens
        self._released = False

    @property
    def headers(self) -> dict[str, str]:
        """For the answer, as things stand now."""
        return self._account.headers() if self._account is not None else {}

    def settle(self, tokens: int) -> None:
        """The request has come to so many tokens, with its prompts: what was reserved beyond is given back, and what it
        ran on is charged. May be said again when it has come to more. Where it never is, all that was reserved is
        charged."""
        if self._account is not None and self._tokens is not None:
            self._account.settle(self._tokens, tokens - self._charged)
            self._charged = tokens

    def release(self) -> None:
        """It has ended. Said again it means nothing."""
        if self._account is not None and not self._released:
            self._released = True
            self._account.ended(self._cost)


def duration(seconds: float) -> str:
    """As OpenAI's headers spell it: 20ms, 1s, 6m0s, 1h0m0s. Rounded up."""
    if 0 < seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + f"{rest}s"


def _next_month(now: float) -> float:
    """When it begins in UTC. Both in seconds since 1970."""
    date = datetime.fromtimestamp(now, UTC)
    year, month = divmod(date.year * 12 + date.month, 12)
    return datetime(year, month + 1, 1, tzinfo=UTC).timestamp()


def _rate(leased: LeasedRate | None, capacity: int | None, now: float, gateways: int) -> LeasedRate | None:
    if capacity is None:
        return None
    if leased is None:
        return LeasedRate(capacity, now, gateways=gateways)
    if leased.capacity != capacity:
        leased.resize(capacity, now)
    return leased


def _cost(limits: TenantLimits, prompts: Sequence[int], answer: int, *, given: bool, choices: int) -> _Cost:
    """What is reserved for a request. Raises InvalidParameter for one that the limits never let in."""
    most, longest, rate = limits.longest_prompt, limits.longest_answer, limits.tokens_per_minute
    if most is not None and max(prompts) > most:
        raise ContextTooLong(f"the prompt has {max(prompts)} tokens; its tenant's longest_prompt is {most}", "prompt")
    if longest is not None and answer > longest:
        if given:
            raise InvalidParameter(f"max_tokens is {answer}; its tenant's longest_answer is {longest}", "max_tokens")
        answer = longest
    answers = len(prompts) * choices
    usual = answer if given or longest is not None else min(_USUAL_ANSWER, answer)
    tokens = sum(prompts)
    least = tokens + answers * usual if given else tokens
    if rate is not None and least > rate:
        raise InvalidParameter(
            f"the request may come to {least} tokens; its tenant's tokens_per_minute is {rate}, so it can never begin: "
            f"send a shorter prompt{', or ask for fewer max_tokens or answers' if given else ''}",
            "max_tokens" if given and tokens <= rate else "prompt",
        )
    tokens += answers * usual
    return _Cost(tokens=tokens if rate is None else min(tokens, rate), longest_answer=answer)
