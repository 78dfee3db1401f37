"""What steps of so many tokens take, learnt from those that run anyway."""

from bisect import bisect
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from math import log2

_KEPT = 64  # observations of a bucket
_LIFE = 64  # steps that an observation speaks for its bucket
_CHECKED = 64  # steps between two looks for buckets that nothing has come to lately
_SLOPE = 0.25  # of proportional growth: what is assumed of sizes beyond the largest seen
_OFTEN = 6  # observations before a size counts as known
_PAIR = 2  # observations that tell a bucket's cost from a step that was disturbed


@dataclass(slots=True)
class Typical:
    """Of some observations, the mean of the middle half. While they are few it leans to the lower ones: what disturbs
    a step (a first one that compiles, another process) makes it longer."""

    tokens: float
    seconds: float
    spread: float  # of that half, relative
    count: int

    @staticmethod
    def of(seen: Collection[tuple[float, int]]) -> "Typical":
        """Of seconds and tokens."""
        low, number = (len(seen) - 1) // 4, (len(seen) + 1) // 2
        middle = sorted(seen)[low : low + number]
        seconds = sum(seconds for seconds, _ in middle) / number
        spread = (middle[-1][0] - middle[0][0]) / seconds if seconds else 0.0
        return Typical(sum(tokens for _, tokens in middle) / number, seconds, spread, len(seen))


class StepCosts:
    """Buckets of sizes, a factor of about the square root of 2 apart; between them, costs are linear and never fall.

    A bucket is forgotten when nothing has come to it for long, the sooner the fewer its observations: what once looked
    dear is tried again.
    """

    def __init__(self, like: "StepCosts | None" = None) -> None:
        """`like`: costs that grow in the same way, for sizes outside those seen."""
        self._like = like
        self._buckets: dict[int, deque[tuple[float, int]]] = {}
        self._typical: dict[int, Typical] = {}
        self._last: dict[int, int] = {}  # when an observation came to a bucket
        self._now = 0  # counts steps
        self._tokens: list[float] | None = []  # the curve's corners, once needed
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
        if self._now % _CHECKED == 0:
            latest = max(self._last.values(), default=0)
            for place, last in list(self._last.items()):
                if self._now - last > _LIFE * len(self._buckets[place]) and last < latest:
                    del self._buckets[place], self._typical[place], self._last[place]
                    self._tokens = None

    def knows(self, tokens: int) -> bool:
        """Whether a size has been seen often that is about this one, or below."""
        most = _place(tokens)
        return any(place <= most and seen.count >= _OFTEN for place, seen in self._typical.items())

    @property
    def top(self) -> float:
        """The largest size that has been seen more than once; 0: none."""
        return max((seen.tokens for seen in self._typical.values() if seen.count >= _PAIR), default=0.0)

    @property
    def noise(self) -> float:
        """How far steps of one size differ, relative to what they take."""
        return max(self._typical.values(), key=lambda seen: seen.count).spread if self._typical else 0.0

    def count(self, tokens: int) -> int:
        """Observations of a size."""
        seen = self._typical.get(_place(tokens))
        return seen.count if seen is not None else 0

    def seconds(self, tokens: int) -> float:
        """What a step of so many takes, 0 while nothing is known."""
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


def _place(tokens: int) -> int:
    return int(2 * log2(tokens) + 0.5)
