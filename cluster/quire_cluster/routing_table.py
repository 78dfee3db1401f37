"""Where requests can go: what the controller publishes and gateways follow."""

from dataclasses import dataclass, field

Key = tuple[int, int, str]  # slot, epoch, address: a controller that was started again counts its epochs anew


@dataclass(frozen=True)
class ReplicaEntry:
    """One line of the routing table."""

    slot: int
    epoch: int
    address: str
    max_model_len: int
    load_seconds: float = 0.0  # from its start until it served
    secret: str = field(default="", repr=False)  # that a session with it must send

    @property
    def key(self) -> Key:
        """What tells this replica from all others, past and present."""
        return (self.slot, self.epoch, self.address)


@dataclass(frozen=True)
class RoutingTable:
    """Where requests can go. `failure`: why there is no replica, and none will come."""

    version: int = 0
    replicas: tuple[ReplicaEntry, ...] = ()
    failure: str | None = None
