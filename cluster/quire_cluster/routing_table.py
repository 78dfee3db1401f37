"""Where requests can go: what the controller publishes and gateways follow."""

from dataclasses import dataclass, field

from quire_cluster.deployment import Deployment

Key = tuple[int, int, str]  # slot, epoch, address


@dataclass(frozen=True)
class ReplicaEntry:
    """One line of the routing table."""

    slot: int
    epoch: int
    address: str
    max_model_len: int
    load_seconds: float = 0.0  # from its start until it served
    secret: str = field(default="", repr=False)  # that a session with it must send
    draining: bool = False  # it takes nothing new, and what it cannot end goes on elsewhere

    @property
    def key(self) -> Key:
        """What tells this replica from all others of its deployment, past and present."""
        return (self.slot, self.epoch, self.address)


@dataclass(frozen=True)
class RoutingTable:
    """The replicas of one model. `failure`: why there is none, and none will come."""

    replicas: tuple[ReplicaEntry, ...] = ()
    failure: str | None = None
    slots: frozenset[int] | None = None  # that should have a replica; None: all that ever had one
    max_model_len: int = 0  # of the replica that loaded last, be it gone; before that, what the model allows
    load_seconds: float = 0.0  # that it took
    ready_at: float | None = None  # in time.time() seconds: when the first of those that load should serve


@dataclass(frozen=True)
class Served:
    """A deployment with what is there of it. One whose model was replaced has replicas of both for a while: `others`
    are of what it was before, by their model revision."""

    deployment: Deployment
    table: RoutingTable
    others: dict[str, RoutingTable] = field(default_factory=dict)


@dataclass(frozen=True)
class ClusterTable:
    """Every deployment. A controller that was started again goes on with higher versions."""

    version: int = 0
    deployments: tuple[Served, ...] = ()
