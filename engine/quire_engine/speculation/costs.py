"""What steps take, learnt from those that run anyway."""

from bisect import bisect
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from math import log2, sqrt

_KEPT = 64  # observations of a bucket
_OFTEN = 6  # observations before a size counts as known, at least
_SURE = 0.06  # and as many as make the error by the noise so small, relative to what such steps take
_PAIR = 2  # observations that tell what a size takes from a step that was disturbed
_LIFE = 1024  # steps for which a bucket speaks after its last observation
_TRUST = 16  # the same of a bucket of drafted steps with one observation; with n, n² times as many
_CHECKED = 16  # steps between two looks for buckets to be forgotten
_SLOPE = 0.25  # of proportional growth: what is assumed of sizes beyond those seen
_GROWTH = 1.5  # from the largest size seen to one that may be tried
_GAPS = 16  # observations before what asking takes is read off whole steps


@dataclass(slots=True)
class Typical:
    """Of some steps, the mean of the middle half. While they are few it leans to the faster ones: what disturbs a step
    (a first one that compiles, another process) makes it longer."""

    tokens: float
    seconds: float
    spread: float  # of that half, relative
    count: int

    @staticmethod
    def of(seen: Collection[tuple[float, int]]) -> "Typical":
        """Of seconds and tokens."""
        cut = max(len(seen) // 4, len(seen) > 2)
        middle = sorted(seen)[cut : len(seen) - cut]
        number = len(middle)
        seconds = sum(seconds for seconds, _ in middle) / number
        spread = (middle[-1][0] - middle[0][0]) / seconds if seconds else 0.0
        return Typical(sum(tokens for _, tokens in middle) / number, seconds, spread, len(seen))


class StepCosts:
    """Buckets of sizes, a factor of about the square root of 2 apart; between them costs are linear, and never fall.

    With `like`, costs that grow in the same way outside the sizes seen, buckets of few observations are soon forgotten:
    what looked dear once is tried again.
    """

    def __init__(self, like: "StepCosts | None" = None) -> None:
        self._like = like
        self._buckets: dict[int, deque[tuple[float, int]]] = {}
        self._typical: dict[int, Typical] = {}
        self._last: dict[int, int] = {}  # when an observation came to a bucket
        self._now = 0  # counts steps
        self._tokens: list[float] | None = []  # the curve's corners; None: to be drawn
        self._seconds: list[float] = []

    def __bool__(self) -> bool:
        """Whether anything has been seen."""
        return bool(self._buckets)

    def observe(self, tokens: int, seconds: float) -> None:
        """A step of so many computed tokens has ended."""
        place = _place(tokens)
        bucket = self._buckets.get(place)
        if bucket is None:
            bucket = self._buckets[place] = deque(maxlen=_KEPT)
        bucket.append((seconds, tokens))
        self._typical[place] = Typical.of(bucket)
        self._last[place] = self._now
        self._tokens = None
        self.pass_by()

    def pass_by(self) -> None:
        """A step has ended that says nothing of these costs: they are a step older."""
        self._now += 1
        if self._now % _CHECKED:
            return
        for place, last in list(self._last.items()):
            life = _LIFE if self._like is None else min(_TRUST * self._typical[place].count ** 2, _LIFE)
            if self._now - last > life and (self._like is not None or len(self._buckets) > 1):
                del self._buckets[place], self._typical[place], self._last[place]
                self._tokens = None

    def knows(self, tokens: int, often: float) -> bool:
        """Whether sizes about this one, or on both sides of it, have been seen so often."""
        place = _place(tokens)
        below = max((at for at, seen in self._typical.items() if at <= place and seen.count >= often), default=None)
        return below is not None and (place - below <= 2 or any(at > place for at in self._typical))

    @property
    def top(self) -> int:
        """The largest size in the uppermost bucket that has been seen more than once; 0: none."""
        place = max((at for at, seen in self._typical.items() if seen.count >= _PAIR), default=None)
        return 0 if place is None else max(tokens for _, tokens in self._buckets[place])

    @property
    def noise(self) -> tuple[int, float]:
        """How far steps of one size differ, relative to what they take, by so many observations."""
        return max(((seen.count, seen.spread) for seen in self._typical.values()), default=(0, 0.0))

    def count(self, tokens: int) -> int:
        """Observations of a size."""
        seen = self._typical.get(_place(tokens))
        return seen.count if seen is not None else 0

    def seconds(self, tokens: int) -> float:
        """What a step of so many takes; 0 while nothing is known. Below the sizes seen no less than the least, beyond
        them a guess that is low rather than high, so that they are tried."""
        if self._tokens is None:
            self._draw()
        xs, ys = self._tokens or [], self._seconds
        if not xs:
            return self._like.seconds(tokens) if self._like is not None else 0.0
        place = bisect(xs, tokens)
        if 0 < place < len(xs):
            x, y = xs[place - 1], ys[place - 1]
            return y + (ys[place] - y) * (tokens - x) / (xs[place] - x)
        x, y = (xs[-1], ys[-1]) if place else (xs[0], ys[0])
        if self._like is not None:
            found = y + self._like.seconds(tokens) - self._like.seconds(round(x))
            least, most = sorted((y, y * tokens / x))
            return min(max(found, least), y + _SLOPE * (most - y))
        if not place or tokens == x:
            return y
        slope = _SLOPE * y / max(x, 16)
        if len(xs) > 1:
            slope = max(slope, min((y - ys[-2]) / (x - xs[-2]), y / x))
        return y + slope * (tokens - x)

    def _draw(self) -> None:
        """The curve: neighbours that fall are pooled (isotonic regression, by pool adjacent violators)."""
        corners = [self._typical[place] for place in sorted(self._typical)]
        pools: list[tuple[float, int, int]] = []  # seconds, observations, corners
        for corner in corners:
            seconds, count, number = corner.seconds, corner.count, 1
            while pools and pools[-1][0] > seconds:
                before, others, length = pools.pop()
                seconds = (before * others + seconds * count) / (others + count)
                count, number = count + others, number + length
            pools.append((seconds, count, number))
        self._tokens = [corner.tokens for corner in corners]
        self._seconds = [seconds for seconds, _, number in pools for _ in range(number)]


class Costs:
    """What drafts add to a step. A step that drafts is planned when the one before it has ended, so that nothing
    overlaps, and may run by other means than a plain one: what such steps take is measured apart."""

    def __init__(self) -> None:
        self.plain = StepCosts()
        self.drafted = StepCosts(like=self.plain)
        self.gap = 0.0  # what a step takes longer for having been asked about
        self._waits: deque[tuple[float, int]] = deque(maxlen=_KEPT)
        self._gaps: deque[tuple[float, int]] = deque(maxlen=_KEPT)

    def knows(self, decoding: int, beside: int) -> bool:
        """Whether plain steps of so many have been seen often enough for their noise, and one with such prompts."""
        often = max(_OFTEN, min((self._noise / _SURE) ** 2, _KEPT / 2))
        return self.plain.knows(decoding, often) and (not beside or self.plain.knows(decoding + beside, 1))

    @property
    def _noise(self) -> float:
        return max(self.plain.noise, self.drafted.noise)[1]

    def worth(self, decoding: int) -> float:
        """Seconds that a token takes in a plain step of so many."""
        return self.plain.seconds(decoding) / decoding

    def extra(self, decoding: int, beside: int, drafts: int) -> float:
        """Seconds that drafts add to a step of so many certain tokens and so many of prompts. Beside prompts by what
        plain steps show: the difference between a drafted step and a plain one is lost in the noise there."""
        certain = decoding + beside
        if beside or not self.drafted:
            return self.plain.seconds(certain + drafts) - self.plain.seconds(certain) + self.gap
        return max(0.0, self.drafted.seconds(certain + drafts) - self.plain.seconds(certain))

    def price(self, decoding: int, beside: int, drafts: int, more: int) -> float:
        """Seconds that `more` drafts add to `drafts`: the first of all also that the next step has to wait. Few are
        priced as a part of many, because what they add by themselves is lost in the noise."""
        before = self.extra(decoding, beside, drafts) if drafts else 0.0
        many = max(more, self.drafted.top - decoding - drafts)
        all_of_them = self.extra(decoding, beside, drafts + many) - before
        return max(all_of_them * more / many, self.extra(decoding, beside, drafts + more) - before)

    def reach(self, decoding: int, beside: int) -> tuple[int, int]:
        """Drafts with which a step is of a size that has been seen, and of one that may be tried."""
        certain = decoding + beside
        top = max(certain, (self.plain if beside else self.drafted).top)
        return top - certain, int(_GROWTH * top) + 1 - certain

    def doubt(self, decoding: int, drafts: int, gain: float) -> float:
        """How many seconds the noise may make of what drafts save that bring so many tokens: plain steps count for
        what is added to them and for what a token is worth."""
        plain = self.plain.seconds(decoding) * (1 + gain / decoding)
        drafted = self.drafted.seconds(decoding + drafts)
        counts = max(1, self.plain.count(decoding)), max(1, self.drafted.count(decoding + drafts))
        return self._noise * sqrt(plain**2 / counts[0] + drafted**2 / counts[1])

    def observe(self, decoding: int, beside: int, drafts: int, seconds: float, waited: float, asked: bool) -> None:
        """A step has ended."""
        tokens = decoding + beside + drafts
        plain = drafted = False
        if waited:
            self._waits.append((waited, 0))
        if drafts and beside:
            self.plain.observe(tokens, max(0.0, seconds - self.gap))
            plain = True
        elif drafts:
            self.drafted.observe(tokens, min(seconds, 2 * self.drafted.seconds(tokens)))
            drafted = True
        elif asked and not beside:
            self._gaps.append((seconds - self.plain.seconds(tokens), 0))
        elif not asked and (not waited or not self.plain):
            self.plain.observe(tokens, seconds)
            plain = True
        if not plain:
            self.plain.pass_by()
        if not drafted:
            self.drafted.pass_by()
        if asked:
            self.gap = Typical.of(self._waits).seconds if self._waits else 0.0
            if len(self._gaps) >= _GAPS:
                self.gap = max(self.gap, Typical.of(self._gaps).seconds)


def _place(tokens: int) -> int:
    return int(2 * log2(tokens) + 0.5)
