"""How many replicas a deployment wants. Plain data in, a number and its reason out.

Two things ask for more at once: a backlog of prompts that takes too long to compute, and replicas whose cache or rows
are nearly all held. A backlog asks for as many replicas as compute what comes in and, where none is starting, for those
that clear what has gathered, in about the time that it takes to start them. While some start, the queue grows without
telling anything new, so only what comes in counts. What comes in is what was computed plus what the queue grew by.

One goes where all that is left would be well below what raises, for all of `idle_seconds`. Between the two lies the
hysteresis: a load that needs n replicas takes away none of n + 1.
"""

import math
from dataclasses import dataclass

_FRESH = 5.0  # seconds; older reports decide nothing, and a longer pause between two looks was not watched
_MEMORY = 5.0  # seconds over which what comes in is averaged
_SLACK = 0.7  # of what raises; one replica less has to stay below it
_SLEEP = 10  # times idle_seconds until the last one goes, where none is allowed


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Of a deployment. They may differ from look to look."""

    min_replicas: int  # 0: it may sleep
    max_replicas: int
    target_backlog: float = 2.0  # seconds that what waits may take to compute
    most_usage: float = 0.9  # share of the cache's pages, or of the rows, that requests may hold
    idle_seconds: float = 300.0  # how long one must not have been needed before it goes

    def __post_init__(self) -> None:
        assert 0 <= self.min_replicas <= self.max_replicas
        assert self.target_backlog > 0 and self.most_usage > 0 and self.idle_seconds >= 0


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What reports say of a deployment."""

    now: float  # seconds, of a clock that never goes back
    age: float = 0.0  # seconds, of the oldest report that this rests on
    serving: int  # replicas that take requests; what drains is left out here and below
    starting: int = 0  # replicas
    start_seconds: float = 0.0  # that one takes to start; 0: not known
    running: int = 0  # requests that have a row
    waiting: int = 0  # requests at replicas that have none
    at_gateways: int = 0  # requests that wait there for a replica
    queued_tokens: int = 0  # at replicas: known, and not computed
    tokens_at_gateways: int = 0  # of the prompts there
    prefill_rate: float = 0.0  # tokens per second that one replica computes of prompts; 0: not measured
    computed: float = 0.0  # tokens of prompts per second that all computed since the last look; none that caches held
    usage: float = 0.0  # mean share of the cache's pages that requests hold
    most_running: int = 0  # rows of one replica; 0: not known

    @property
    def waits(self) -> int:
        """Requests that a further replica could take."""
        return self.waiting + self.at_gateways

    @property
    def requests(self) -> int:
        return self.running + self.waits

    @property
    def tokens(self) -> int:
        """Of prompts, that are still to be computed."""
        return self.queued_tokens + self.tokens_at_gateways


class Scaling:
    """Of one deployment. A new one begins with as many replicas as there are."""

    def __init__(self) -> None:
        self.reason = ""  # of what was wanted last, in plain words
        self._wanted: int | None = None
        self._last: Observed | None = None  # fresh; None: none yet, or what came after was not
        self._inflow: float | None = None  # tokens per second
        self._quiet: float | None = None  # seconds that one replica less would have done; None: it would not

    def wanted(self, rules: Rules, seen: Observed) -> int:
        """How many replicas there should be, now; to be asked every second or so."""
        if self._wanted is None:
            self._wanted = seen.serving + seen.starting
        if seen.age > _FRESH:
            self._last = None
            self.reason = f"reports are {seen.age:.0f} s old: holding"
        else:
            self._follow(seen)
            self._wanted = self._decide(self._wanted, rules, seen)
        if self._wanted > rules.max_replicas:
            self.reason += f"; at most {rules.max_replicas} may be"
        if self._wanted < rules.min_replicas:
            self.reason += f"; at least {rules.min_replicas} must be"
        self._wanted = min(max(self._wanted, rules.min_replicas), rules.max_replicas)
        return self._wanted

    def _follow(self, seen: Observed) -> None:
        """What comes in, and how long it has been quiet, up to this look."""
        last, self._last = self._last, seen
        if self._inflow is None:
            self._inflow = seen.computed
        if last is not None and seen.now > last.now:
            seconds = seen.now - last.now
            latest = seen.computed + (seen.tokens - last.tokens) / seconds
            self._inflow -= math.expm1(-seconds / _MEMORY) * (latest - self._inflow)
            if self._quiet is not None:
                self._quiet += min(seconds, _FRESH)

    def _decide(self, wanted: int, rules: Rules, seen: Observed) -> int:
        needed, self.reason = max(self._needs(rules, seen))
        if needed > wanted or not self._spare(wanted - 1, rules, seen):
            self._quiet = None
            if 0 < needed <= wanted and seen.starting:
                self.reason += f": {seen.starting} are starting"
            return max(wanted, needed)
        quiet = self._quiet = self._quiet or 0.0
        patience = rules.idle_seconds * (1 if wanted > 1 else _SLEEP)
        if wanted <= rules.min_replicas or quiet < patience:
            return wanted
        self._quiet = 0.0
        self.reason = f"idle for {patience:.0f} s"
        return wanted - 1

    def _needs(self, rules: Rules, seen: Observed) -> list[tuple[int, str]]:
        """What asks for how many replicas, and why; the first asks for none, and says how it stands."""
        capacity = seen.prefill_rate * seen.serving
        backlog = seen.tokens / capacity if capacity else 0.0
        stands = f"backlog of {backlog:.1f} s, target {rules.target_backlog:g} s"
        needs = [(0, stands if capacity or seen.requests else "no requests")]
        if seen.waits and not seen.serving:
            needs.append((1, f"{_waiting(seen)}, and nothing serves"))
        excess = seen.tokens - rules.target_backlog * capacity
        if seen.prefill_rate and excess > 0:
            needed = self._load(seen)
            if not seen.starting:
                needed += excess / seen.prefill_rate / max(rules.target_backlog, seen.start_seconds)
            why = stands if seen.serving else f"{_waiting(seen)}, and nothing serves"
            if needed > seen.serving + seen.waits:  # what runs already cannot be shared out
                needed, why = seen.serving + seen.waits, f"{why}: {_waiting(seen)} that could go elsewhere"
            needs.append((_whole(needed), why))
        if not seen.prefill_rate and seen.waits:
            needed = seen.requests / seen.most_running if seen.most_running else 1
            why = f"{_waiting(seen)}, and how fast prompts are computed is not measured yet"
            needs.append((_whole(needed), why))
        for share, of in ((seen.usage, "the cache"), (_rows(seen), "the rows")):
            if share > rules.most_usage and seen.serving:
                # No more than twice: it is not known how long they hold it, and so how many will at a time.
                needed = min(_whole(_held(share, seen) / rules.most_usage), 2 * seen.serving)
                needs.append((needed, f"requests hold {share:.0%} of {of}, at most {rules.most_usage:.0%} should be"))
        return needs

    def _load(self, seen: Observed) -> float:
        """Replicas that compute what comes in, as fast as it does."""
        return max(self._inflow or 0.0, 0.0) / seen.prefill_rate if seen.prefill_rate else 0.0

    def _spare(self, left: int, rules: Rules, seen: Observed) -> bool:
        """Whether `left` replicas would do."""
        if left <= 0:
            return left == 0 and not seen.requests
        share = max(seen.usage, _rows(seen))
        if max(self._load(seen), _held(share, seen) / rules.most_usage) > _SLACK * left:
            return False
        if seen.requests <= left:  # each has a replica for itself, and would not be done sooner with more
            return True
        if not seen.prefill_rate:
            return not seen.waits
        return seen.tokens <= _SLACK * rules.target_backlog * seen.prefill_rate * left


def _waiting(seen: Observed) -> str:
    return "1 request waits" if seen.waits == 1 else f"{seen.waits} requests wait"


def _rows(seen: Observed) -> float:
    """Share of the rows that requests hold."""
    rows = seen.most_running * seen.serving
    return seen.running / rows if rows else 0.0


def _held(share: float, seen: Observed) -> float:
    """Replicas that would be held entirely if all requests ran, where those that run hold `share` of each."""
    return share * seen.serving * seen.requests / max(seen.running, 1)


def _whole(replicas: float) -> int:
    return math.ceil(round(replicas, 6))
