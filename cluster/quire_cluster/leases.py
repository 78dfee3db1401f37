"""What tenants may have, as the controller lends it to gateways. Nothing of it is kept: gateways say what they hold."""

from dataclasses import dataclass

from quire_engine.errors import ServerError

from quire_cluster.policies.quota import Ask, Grant, Grants, SharedRate, SharedSlots, TenantAsk, TenantGrant, Want

_SILENCE = 10.0  # seconds after which a gateway is dead: what it held is free
_LEARNING = 3.0  # seconds after the start in which gateways say what they held before


@dataclass
class _Tenant:
    """What is shared of its limits; None: it has no such limit."""

    revision: int
    requests: SharedRate | None = None
    tokens: SharedRate | None = None
    slots: SharedSlots | None = None


class Leases:
    """`lease` answers an ask. Gateways that hold anything ask once a second at least.

    A controller that was started again lends what was left as far as gateways know, which is what was left where all of
    them ask before anything more is used, and one minute's limit at most; and for a few seconds of the slots no gateway
    gets more than its share.
    """

    def __init__(self, now: float) -> None:
        """`now`: the clock of each ask begins here, in seconds."""
        self._began = now
        self._heard: dict[str, tuple[int, float]] = {}  # by gateway: the number of its last ask, and when it came
        self._tenants: dict[str, _Tenant] = {}

    def lease(self, ask: Ask, now: float, gateways: int) -> Grants:
        """What a gateway may use. `gateways`: there are, as others say. Raises ServerError for an ask that a later one
        of that gateway has overtaken."""
        number, _ = self._heard.get(ask.gateway, (0, 0.0))
        if ask.number <= number:
            raise ServerError(f"{ask.gateway} has said something newer; this is of no use any more")
        for name in [name for name, (_, at) in self._heard.items() if now - at >= _SILENCE]:
            self._forget(name)
        self._heard[ask.gateway] = (ask.number, now)
        learning = now - self._began < _LEARNING
        gateways = max(gateways, len(self._heard), ask.gateways if learning else 1)
        parts = gateways if learning else 1
        granted = {name: self._lend(ask.gateway, name, one, now, parts) for name, one in ask.tenants.items()}
        return Grants(gateways=gateways, tenants=granted)

    def _forget(self, gateway: str) -> None:
        del self._heard[gateway]
        for tenant in self._tenants.values():
            for shared in (tenant.requests, tenant.tokens, tenant.slots):
                if shared is not None:
                    shared.forget(gateway)

    def _lend(self, gateway: str, name: str, ask: TenantAsk, now: float, parts: int) -> TenantGrant:
        tenant = self._tenants.setdefault(name, _Tenant(ask.revision))
        newest = ask.revision >= tenant.revision
        tenant.revision = max(tenant.revision, ask.revision)
        learning = now - self._began < _LEARNING
        tenant.requests = _rate(tenant.requests, ask.requests, now, newest=newest)
        tenant.tokens = _rate(tenant.tokens, ask.tokens, now, newest=newest)
        if newest:
            tenant.slots = _slots(tenant.slots, ask.slots)

        def lend(shared: SharedRate | None, want: Want | None) -> Grant | None:
            if want is None or shared is None:
                return _unlimited(want)
            if learning:
                shared.knew(gateway, want.level, now)
            return shared.lease(gateway, want, now)

        slots = _unlimited(ask.slots)
        if ask.slots is not None and tenant.slots is not None:
            slots = tenant.slots.lease(gateway, ask.slots, now, parts)
        return TenantGrant(
            requests=lend(tenant.requests, ask.requests), tokens=lend(tenant.tokens, ask.tokens), slots=slots
        )


def _unlimited(want: Want | None) -> Grant | None:
    """To a gateway that does not know yet that there is no such limit any more."""
    return Grant(granted=want.used + want.need + want.ahead, level=want.limit) if want is not None else None


def _rate(shared: SharedRate | None, want: Want | None, now: float, *, newest: bool) -> SharedRate | None:
    """As the newest limits have it."""
    if not newest:
        return shared
    if want is None:
        return None
    if shared is None:
        return SharedRate(want.limit, now, want.level)
    if shared.capacity != want.limit:
        shared.resize(want.limit, now)
    return shared


def _slots(shared: SharedSlots | None, want: Want | None) -> SharedSlots | None:
    if want is None:
        return None
    if shared is None:
        return SharedSlots(want.limit)
    shared.capacity = want.limit
    return shared
