"""Which nodes have gateways, where not the head alone has. Plain data in, a decision out."""

from collections.abc import Collection

_UNUSED = 60.0  # seconds without a replica; one that is started again may be back on its node by then


class Hosts:
    """The head, and each node that has a replica, or just had one: Ray's autoscaler takes no node on which an actor is,
    so a gateway that stayed would keep the node of a deployment that sleeps."""

    def __init__(self) -> None:
        self._used: dict[str, float] = {}  # by node: when a replica was there last

    def of(self, nodes: Collection[str], head: str, busy: Collection[str], now: float) -> list[str]:
        """Of the `nodes` that are there, as of `now` (seconds). `busy`: those that have replicas."""
        self._used |= dict.fromkeys(busy, now)
        self._used = {node: at for node, at in self._used.items() if now - at < _UNUSED}
        return [node for node in nodes if node == head or node in self._used]
