"""What gateways said of a deployment, made ready for the scaling policy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from quire_cluster.policies.scaling import Observed
from quire_cluster.reports import ReplicaReport
from quire_cluster.routing_table import Key

_UNHEARD = 5.0  # seconds after which a replica that nobody has reported makes the reports old


@dataclass(frozen=True, kw_only=True)
class Demand:
    """The freshest word of each replica, and what waits for one."""

    replicas: Mapping[Key, ReplicaReport]
    heard: bool = True  # from any gateway
    at_gateways: int = 0
    tokens_at_gateways: int = 0
    waiting_for: Mapping[str, int] = field(default_factory=dict)  # requests, by what they wait for


class Observer:
    """Of one deployment. Rates are differences to the look before."""

    def __init__(self) -> None:
        self._computed: dict[Key, int] = {}
        self._looked: float | None = None

    def look(
        self, now: float, demand: Demand, serving: Sequence[tuple[Key, float]], *, starting: int, start_seconds: float
    ) -> Observed:
        """`now` in seconds. `serving`: replicas, and for how many seconds they do."""
        reports = [demand.replicas[key] for key, _ in serving if key in demand.replicas]
        unheard = [seconds for key, seconds in serving if key not in demand.replicas]
        age = max([one.age for one in reports] + [seconds for seconds in unheard if seconds > _UNHEARD], default=0.0)
        rates = [one.prefill_rate for one in reports if one.prefill_rate]
        usage = [one.pages_used / one.pages_total for one in reports if one.pages_total]
        return Observed(
            now=now,
            age=age if demand.heard else float("inf"),
            serving=len(serving),
            starting=starting,
            start_seconds=start_seconds,
            running=sum(one.running for one in reports),
            waiting=sum(one.waiting for one in reports),
            at_gateways=demand.at_gateways,
            queued_tokens=sum(one.queued_tokens for one in reports),
            tokens_at_gateways=demand.tokens_at_gateways,
            prefill_rate=sum(rates) / len(rates) if rates else 0.0,
            computed=self._rate(now, reports),
            usage=sum(usage) / len(usage) if usage else 0.0,
            most_running=max((one.rows for one in reports), default=0),
        )

    def _rate(self, now: float, reports: Sequence[ReplicaReport]) -> float:
        """Tokens of prompts per second, since the last look."""
        before, self._computed = self._computed, {one.key: one.computed for one in reports}
        seconds = now - self._looked if self._looked is not None else 0.0
        self._looked = now
        done = sum(max(0, one.computed - before[one.key]) for one in reports if one.key in before)
        return done / seconds if seconds > 0 else 0.0
