"""What steps take, learnt from those that run anyway."""

from bisect import bisect
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from math import log2

_KEPT = 32  # observations of a bucket
_OFTEN = 4  # observations before a size counts as known, at least
_SURE = 0.06  # and as many as make the error by the noise so small, relative to what such steps take
_LIFE = 1024  # steps for which a bucket speaks after its last observation
_DRAFTED_LIFE = 512  # the same of drafted steps
_TRUST = 16  # the same of a bucket of drafted steps with one observation; with n, n² times as many
_CHECKED = 16  # steps between two looks for buckets to be forgotten
_FAR = 1.4  # times what is usual
_CHANGED = 4  # steps in a row so far from it, to one side, after which only they count
_SLOPE = 0.25  # of proportional growth: what is assumed of sizes beyond those seen
_GROWTH = 1.5  # from the largest size seen to one that may be tried
_DISTURBED = 1.5  # times what is usual for a step: what takes longer was held up by something else
_GAP_MEMORY = 8  # waits over which is averaged
_GAP_LIFE = 256  # steps in which the gap is forgotten, so that it is measured again


@dataclass(slots=True)
class Typical:
    """Of some steps, the mean of the middle half. While they are few it leans to the faster ones: what disturbs a step
    (a first one that compiles, another process) makes it longer."""

    tokens: float
    seconds: float
    spread: float  # of that half, relative
    count: int

    @property
    def sure(self) -> bool:
        """Whether they are enough for the noise."""
        return self.count == _KEPT or self.count >= max(_OFTEN, (self.spread / _SURE) ** 2)

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
    what looked dear once is tried again, and then ever more rarely.
    """

    def __init__(self, like: "StepCosts | None" = None) -> None:
        self._like = like
        self._buckets: dict[int, deque[tuple[float, int]]] = {}
        self._typical: dict[int, Typical] = {}
        self._last: dict[int, int] = {}  # when an observation came to a bucket
        self._counts: dict[int, int] = {}  # of observations, those forgotten too
        self._now = 0  # counts steps
        self._tokens: list[float] | None = []  # the curve's corners; None: to be drawn
        self._seconds: list[float] = []

    def __bool__(self) -> bool:
        """Whether anything has been seen."""
        return bool(self._buckets)

    def observe(self, tokens: int, seconds: float) -> bool:
        """A step of so many computed tokens has ended. Whether times have changed: what such steps took before says
        nothing any more."""
        place = _place(tokens)
        bucket = self._buckets.get(place)
        if bucket is None:
            bucket = self._buckets[place] = deque(maxlen=_KEPT)
        bucket.append((seconds, tokens))
        off = {self.off(*seen) for seen in list(bucket)[-_CHANGED:]}
        changed = len(bucket) > _CHANGED and (off == {1} or off == {-1})
        while changed and len(bucket) > _CHANGED:
            bucket.popleft()
        self._typical[place] = Typical.of(bucket)
        self._last[place] = self._now
        self._counts[place] = self._counts.get(place, 0) + 1
        self._tokens = None
        return changed

    def pass_by(self) -> None:
        """What is known is a step older."""
        self._now += 1
        if self._now % _CHECKED:
            return
        for place, last in list(self._last.items()):
            life = _LIFE if self._like is None else min(_TRUST * self._counts[place] ** 2, _DRAFTED_LIFE)
            if self._now - last > life and (self._like is not None or len(self._buckets) > 1):
                del self._buckets[place], self._typical[place], self._last[place]
                self._tokens = None

    def knows(self, tokens: int) -> bool:
        """Whether sizes about this one, or on both sides of it, have been seen often enough."""
        place = _place(tokens)
        below = max((at for at, seen in self._typical.items() if at <= place and seen.sure), default=None)
        return below is not None and (place - below <= 2 or any(at > place for at in self._typical))

    def off(self, seconds: float, tokens: int) -> int:
        """Whether that is far too long for a step of this size (1), or far too short (-1)."""
        seen = self._typical.get(_place(tokens))
        return 0 if seen is None else (seconds > _FAR * seen.seconds) - (seconds < seen.seconds / _FAR)

    def undisturbed(self, seconds: float, tokens: int) -> float:
        """What a step of this size took, but for what must have held it up."""
        seen = self._typical.get(_place(tokens))
        return min(seconds, _DISTURBED * seen.seconds) if seen is not None and seen.count > 1 else seconds

    def forget(self, tokens: int = 0) -> None:
        """What was seen, but for steps of this size."""
        for place in self._buckets.keys() - ({_place(tokens)} if tokens else set()):
            del self._buckets[place], self._typical[place], self._last[place]
        self._tokens = None

    @property
    def top(self) -> int:
        """The largest size seen; 0: none."""
        return max((tokens for _, tokens in self._buckets[max(self._buckets)]), default=0) if self._buckets else 0

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
        self.gap = 0.0  # seconds for which nothing is computed because a step waits for the one before it

    def extra(self, certain: int, drafts: int) -> float:
        """Seconds that drafts add to a step of so many tokens otherwise."""
        plain = self.plain.seconds(certain)
        if not self.drafted:
            return self.plain.seconds(certain + drafts) - plain + self.gap
        return max(0.0, self.drafted.seconds(certain + drafts) - plain)

    def reach(self, certain: int) -> int:
        """Drafts that a step may have: of a size that has been seen, or not far beyond."""
        return int(_GROWTH * max(certain, self.plain.top, self.drafted.top)) + 1 - certain

    def observe(self, tokens: int, drafts: int, seconds: float, waited: float) -> float:
        """A step has ended; of its tokens so many were drafts. How long it took but for what else held it up."""
        self.plain.pass_by()
        self.drafted.pass_by()
        waited = min(waited, (self.drafted if drafts else self.plain).undisturbed(seconds, tokens))
        if waited:
            self.gap += (waited - self.gap) / _GAP_MEMORY if self.gap else waited
        else:
            self.gap -= self.gap / _GAP_LIFE
        if drafts:
            seconds = self.drafted.undisturbed(seconds, tokens)
            if self.drafted.observe(tokens, seconds):
                self.drafted.forget(tokens)
        elif (not waited or not self.plain) and self.plain.observe(tokens, seconds):
            self.drafted.forget()
        return seconds


def _place(tokens: int) -> int:
    return int(2 * log2(tokens) + 0.5)
