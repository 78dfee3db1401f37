"""What a tenant may have, where several gateways let its requests in. Plain data and times in, amounts out.

What there is lies with the controller: of so much a minute a bucket that fills all the time, of so many at a time the
slots that are free. Gateways lease from it, a little ahead, and decide by what they hold. So that an amount is never
let in twice, it is either in the bucket, or held by one gateway, or used; and a bucket fills only as far as it and all
that is held come to the whole limit. So in any t seconds no more than limit × (1 + t / 60) is let in, and never more
than the limit of requests runs at a time: exactly, while nothing fails.

A gateway says all it has used since it began, and what it was granted in all is what it hears: an ask or an answer that
is lost is made up for by the next. What it is about to give back it does not use while it says so.

Where the controller is away a gateway goes on with its share, of what was left when it last heard of it; that is a debt
which the next ask says. The docstrings of `LeasedRate.share` and `SharedSlots` say how much more that can be.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

_MINUTE = 60.0
_TURN = 1.5  # seconds that some is left for a gateway that got too little: while it has requests, it asks again in one
_AHEAD = 32  # a gateway holds one part of so many more than it needs
_AHEAD_ALL = 8  # and all gateways together one of so many


@dataclass(frozen=True, kw_only=True, slots=True)
class Want:
    """What a gateway says of one limit of one tenant."""

    limit: int
    used: int  # of a rate: since the gateway began, less what was given back; of slots: now
    held: int  # granted and not used; below 0: used without a grant
    need: int  # requests wait for so much
    ahead: int  # that it would hold beside
    level: float = 0.0  # of a rate: what is left for all, at most, as far as the gateway knows


@dataclass(frozen=True, kw_only=True, slots=True)
class Grant:
    """What the controller answers to it."""

    granted: int  # in all, with what was used
    level: float  # what is left for all; below 0: more was used than there was


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantAsk:
    """What a gateway says of a tenant; None: it has no such limit."""

    revision: int  # of the limits: the newest holds
    requests: Want | None
    tokens: Want | None
    slots: Want | None


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantGrant:
    """What the controller answers to it."""

    requests: Grant | None
    tokens: Grant | None
    slots: Grant | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """All that a gateway says at a time."""

    gateway: str  # another one each time that it is started
    number: int  # of its asks: an older one that comes later says nothing
    gateways: int  # there are, as far as it knows
    tenants: dict[str, TenantAsk]


@dataclass(frozen=True, kw_only=True, slots=True)
class Grants:
    """The answer: of every tenant that was asked for."""

    gateways: int  # there are
    tenants: dict[str, TenantGrant]


class Level:
    """What is left in a bucket that `rate` a second flow into, until `capacity` are there."""

    def __init__(self, capacity: float, now: float, amount: float) -> None:
        self._capacity = capacity
        self._at = now
        self._amount = amount

    def read(self, now: float) -> float:
        """Below 0: more was taken than there was. `now`: in seconds; where it is before the last one, nothing flows."""
        flowed = max(0.0, now - self._at) * self._capacity / _MINUTE
        return max(self._amount, min(self._capacity, self._amount + flowed))

    def write(self, amount: float, now: float) -> None:
        """What is left from now on."""
        self._amount, self._at = amount, now


# ---- what the controller has --------------------------------------------------------------------------------------


class _Turns:
    """Gateways that got less than they needed. Whoever asks leaves each that came before it an equal part."""

    def __init__(self) -> None:
        self._waits: dict[str, tuple[float, int]] = {}  # in their order: when each asked, and for what

    def share(self, gateway: str, want: Want, kept: int, free: float, now: float) -> int:
        """How much more a gateway gets that has `kept`, where so much is free."""
        self._waits = {name: wait for name, wait in self._waits.items() if now - wait[0] < _TURN}
        before = []
        for name, (_, amount) in self._waits.items():
            if name == gateway:
                break
            before.append(amount)
        whole = max(0, int(free))
        part = max(1, whole // (len(before) + 1))
        left = max(0, whole - sum(min(amount, part) for amount in before))
        more = max(0, min(want.need + want.ahead - kept, left))
        missing = want.need - kept - more
        if more or missing <= 0:
            self._waits.pop(gateway, None)  # its next turn is after those of the others
        if missing > 0:
            self._waits[gateway] = (now, missing)
        return more


class SharedRate:
    """So much a minute, of all gateways."""

    def __init__(self, capacity: int, now: float, level: float) -> None:
        """`level`: that it begins with."""
        self.capacity = capacity
        self._level = Level(capacity, now, min(level, capacity))
        self._granted: dict[str, int] = {}  # to gateways that hold something, with what each has used
        self._held: dict[str, int] = {}
        self._turns = _Turns()

    def resize(self, capacity: int, now: float) -> None:
        """What is more is there at once; of what is less nobody gets into debt."""
        level = self._level.read(now)
        level += max(0, capacity - self.capacity)
        self.capacity = capacity
        self._level = Level(capacity, now, min(level, capacity))

    def knew(self, gateway: str, level: float, now: float) -> None:
        """A gateway that was there before this controller says what was left."""
        if gateway not in self._held:
            self._level.write(min(level, self._level.read(now)), now)

    def lease(self, gateway: str, want: Want, now: float) -> Grant:
        """What a gateway may use. What it holds, and wants to keep, stays its own: it may be used already."""
        level = min(self._level.read(now), self.capacity - sum(self._held.values()))
        held = self._granted.get(gateway, want.used + want.held) - want.used
        kept = min(max(held, 0), want.need + want.ahead)
        self.forget(gateway)
        level = min(level + held - kept, self.capacity - sum(self._held.values()) - kept)
        more = self._turns.share(gateway, want, kept, level, now)
        if kept + more:
            self._held[gateway] = kept + more
            self._granted[gateway] = want.used + kept + more
        self._level.write(level - more, now)
        return Grant(granted=want.used + kept + more, level=level - more)

    def forget(self, gateway: str) -> None:
        """What it held is used, for all that is known."""
        self._held.pop(gateway, None)
        self._granted.pop(gateway, None)


class SharedSlots:
    """So many at a time, of all gateways.

    More can run after a controller was started again, or has not heard of a gateway for so long that it took it for
    dead: each gateway keeps what it had, or runs up to its share. That is less than twice the limit (and one a gateway,
    where there are more of them than slots), and gets less with each request that ends.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._granted: dict[str, int] = {}
        self._turns = _Turns()

    def lease(self, gateway: str, want: Want, now: float, parts: int) -> Grant:
        """How many a gateway may have. `parts`: of which each gateway gets one at most; 1: it may get all."""
        self.forget(gateway)
        kept = min(want.used + max(0, want.held), want.used + want.need + want.ahead)
        free = self.capacity - kept - sum(self._granted.values())
        if parts > 1:
            free = min(free, max(1, self.capacity // parts) - kept)
        more = self._turns.share(gateway, want, kept - want.used, free, now)
        if kept + more:
            self._granted[gateway] = kept + more
        return Grant(granted=kept + more, level=free - more)

    def forget(self, gateway: str) -> None:
        """It has none any more."""
        self._granted.pop(gateway, None)


# ---- what a gateway has -------------------------------------------------------------------------------------------


class Leased(ABC):
    """A gateway's part of a limit."""

    FRESH = 1.0  # seconds for which it holds what was left for all: others may give back more

    def __init__(self, capacity: int, *, used: int = 0, gateways: int = 1) -> None:
        """`gateways`: there are, as far as it knows."""
        self.capacity = capacity
        self.gateways = gateways
        self.used = used
        self.granted = used  # in all; less than the controller says where some is to be given back
        self._owned = used  # as the controller last said
        self._wanted = 0
        self._heard = -math.inf  # when that was, where nothing was given back since

    @property
    def held(self) -> int:
        """Granted, and not used; below 0: used without a grant."""
        return self.granted - self.used

    @property
    def ahead(self) -> int:
        """That is worth holding while requests come. Of a small limit nothing: it might be missed elsewhere, and there
        are few requests to ask for."""
        return self.capacity // max(_AHEAD, _AHEAD_ALL * self.gateways)

    @property
    def low(self) -> bool:
        """Requests will soon have to wait."""
        return 2 * self.held < self.ahead

    @property
    def surplus(self) -> bool:
        """There is something to give back."""
        return self._owned > self.granted

    @property
    def silent(self) -> bool:
        """There is nothing that the controller has to hear now and then."""
        return self.held == 0 and not self.surplus

    def use(self, amount: int, now: float) -> None:
        """Below 0: it is no longer used. Of that no more stays here than is worth holding."""
        before = self.held
        self.used += amount
        self.granted = min(self.granted, self.used + max(before, self.ahead))
        if amount < 0:
            self._heard = -math.inf

    def ask(self, need: int, now: float, *, more_to_come: bool) -> Want:
        """What to say. What is given back by it cannot be used from now on."""
        ahead = self.ahead if more_to_come else 0
        self._wanted = need + ahead
        self.granted = min(self.granted, self.used + self._wanted)
        return Want(limit=self.capacity, used=self.used, held=self.held, need=need, ahead=ahead, level=self.left(now))

    def hear(self, grant: Grant, gateways: int, now: float) -> None:
        """What was answered. What ended meanwhile is given back the next time."""
        self.gateways = gateways
        self._heard = now
        self._owned = grant.granted
        self.granted = min(grant.granted, self.used + self._wanted)

    def resize(self, capacity: int, now: float) -> None:
        """Operators changed the limit."""
        self.capacity = capacity
        self._heard = -math.inf

    def exhausted(self, amount: int, now: float) -> bool:
        """There is not so much, with what this gateway holds: nobody has to be asked."""
        return amount > self.most or (now - self._heard < self.FRESH and max(0.0, self.left(now)) + self.held < amount)

    @property
    @abstractmethod
    def most(self) -> int:
        """That it could hold if no other gateway did."""

    @abstractmethod
    def left(self, now: float) -> float:
        """For all gateways, as far as is known, without what this one holds."""

    @abstractmethod
    def share(self, now: float) -> float:
        """What it may use now where the controller does not answer, with what it holds."""

    @abstractmethod
    def wait(self, amount: int, now: float, *, alone: bool) -> float:
        """Seconds until there should be so much."""


class LeasedRate(Leased):
    """Of so much a minute."""

    def __init__(self, capacity: int, now: float, *, gateways: int = 1) -> None:
        """Of a bucket that is full, for all that is known."""
        super().__init__(capacity, gateways=gateways)
        self._left = Level(capacity, now, capacity)
        self._share = Level(self._part, now, self._part)

    @property
    def _part(self) -> float:
        return max(1.0, self.capacity / self.gateways)

    def use(self, amount: int, now: float) -> None:
        """What is used without a grant is out of the share."""
        debt = min(0, self.held)
        super().use(amount, now)
        self._share.write(min(self._part, self._share.read(now) + min(0, self.held) - debt), now)

    def ask(self, need: int, now: float, *, more_to_come: bool) -> Want:
        """A debt that the share has made up for, in a long time alone, is none any more."""
        if self.held < 0:
            self.granted = max(self.granted, self.used - math.ceil(self._part - self._share.read(now)))
        return super().ask(need, now, more_to_come=more_to_come)

    def hear(self, grant: Grant, gateways: int, now: float) -> None:
        """The share is one of what is left."""
        super().hear(grant, gateways, now)
        self._left = Level(self.capacity, now, grant.level)
        self._share = Level(self._part, now, max(0.0, grant.level) / gateways + min(0, self.held))

    def resize(self, capacity: int, now: float) -> None:
        """The share of it, too."""
        super().resize(capacity, now)
        self._left = Level(capacity, now, min(capacity, self._left.read(now)))
        self._share = Level(self._part, now, min(self._part, self._share.read(now)))

    @property
    def most(self) -> int:
        """A bucket that is full."""
        return self.capacity

    def left(self, now: float) -> float:
        """It has grown since it was last heard of."""
        return self._left.read(now)

    def share(self, now: float) -> float:
        """Of what was left for all when the controller last answered, and of what flowed since, as much as for any
        other gateway. In t seconds alone a gateway uses limit / gateways × (1 + t / 60) of it at most (1 for limit /
        gateways, where that is more): as much more than the limit says can be let in, by each gateway that is alone."""
        return max(0, self.held) + self._share.read(now)

    def wait(self, amount: int, now: float, *, alone: bool) -> float:
        """By what flows."""
        if alone:
            return max(0.0, amount - self.share(now)) * _MINUTE / self._part
        return max(0.0, amount - self.held - self.left(now)) * _MINUTE / self.capacity

    def remaining(self, now: float) -> float:
        """What is left for all, with what is held here."""
        return min(self.capacity, max(0.0, self.held + self.left(now)))

    def full(self, now: float) -> float:
        """Seconds until the whole limit is there again."""
        return max(0.0, self.capacity - self.held - self.left(now)) * _MINUTE / self.capacity


class LeasedSlots(Leased):
    """Of so many at a time."""

    FRESH = 0.1
    _left = 0.0

    def hear(self, grant: Grant, gateways: int, now: float) -> None:
        """What is free."""
        super().hear(grant, gateways, now)
        self._left = grant.level

    @property
    def silent(self) -> bool:
        """It would be taken for dead while requests run."""
        return super().silent and not self.used

    @property
    def most(self) -> int:
        """All that are not used here."""
        return self.capacity - self.used

    def left(self, now: float) -> float:
        """As was last heard: they end at any time."""
        return self._left

    def share(self, now: float) -> float:
        """As many as for any other gateway; what is held and runs is among them."""
        return max(self.held, max(1, self.capacity // self.gateways) - self.used)

    def wait(self, amount: int, now: float, *, alone: bool) -> float:
        """Nobody knows."""
        return 0.0
