"""How everything is, as the controller sees it: for `quire status`."""

from collections.abc import Mapping
from dataclasses import dataclass

from quire_protos.v1 import control_pb2 as pb

from quire_cluster.addresses import with_port
from quire_cluster.demand import Demand
from quire_cluster.keeper import Keeper
from quire_cluster.nodes import Nodes, is_head
from quire_cluster.policies.reconcile import Phase
from quire_cluster.reports import GatewayReport

_SPAN = 5.0  # seconds that a rate is an average of


class Rates:
    """Tokens per second of each deployment, from what gateways have counted."""

    def __init__(self) -> None:
        self._counted: dict[tuple[str, str], tuple[float, int, float]] = {}  # (gateway, deployment) → when, what, rate

    def take(self, report: GatewayReport, now: float) -> None:
        """A gateway's report, which came at `now` (seconds)."""
        for name, model in report.models.items():
            at, count, rate = self._counted.get((report.identity, name), (now, model.generated, 0.0))
            if now - at >= _SPAN:
                rate, at, count = max(0, model.generated - count) / (now - at), now, model.generated
            self._counted[report.identity, name] = (at, count, rate)

    def of(self, name: str, gateways: set[str]) -> float:
        """Of a deployment, over those gateways."""
        return sum(
            rate for (gateway, one), (_, _, rate) in self._counted.items() if one == name and gateway in gateways
        )


@dataclass(frozen=True, kw_only=True)
class Overview:
    """What a controller knows. `reports`: of gateways, with when they came, in time.monotonic() seconds as `now`."""

    cluster: str
    now: float
    since: float  # of the controller's start
    keepers: Mapping[str, Keeper]
    demands: Mapping[str, Demand]  # by deployment
    reports: Mapping[str, tuple[float, GatewayReport]]
    rates: Rates
    nodes: Nodes


def status(seen: Overview) -> pb.StatusResponse:
    """Of the whole cluster."""
    nodes = seen.nodes
    return pb.StatusResponse(
        cluster=seen.cluster,
        seconds=seen.now - seen.since,
        deployments=[_deployment(seen, name, keeper) for name, keeper in seen.keepers.items()],
        gateways=[_gateway(report, seen.now - at) for at, report in seen.reports.values()],
        nodes=[
            pb.NodeStatus(
                id=node["NodeID"],
                address=node["NodeManagerAddress"],
                head=is_head(node),
                leaving=node["NodeID"] in nodes.leaving,
                cpus=node["Resources"].get("CPU", 0),
                gpus=node["Resources"].get("GPU", 0),
            )
            for node in nodes.alive
        ],
    )


def _gateway(report: GatewayReport, age: float) -> pb.GatewayStatus:
    return pb.GatewayStatus(
        id=report.identity,
        node=report.node,
        http=with_port(report.host, report.http_port),
        grpc=with_port(report.host, report.grpc_port),
        ready=report.ready,
        open_requests=report.open_requests,
        age=age,
        tls=report.tls,
    )


def _deployment(seen: Overview, name: str, keeper: Keeper) -> pb.DeploymentStatus:
    demand, config = seen.demands[name], keeper.deployment.config
    found = pb.DeploymentStatus(
        name=name,
        aliases=keeper.deployment.names[1:],
        model=keeper.deployment.engine.model,
        state=_state(keeper),
        wanted=keeper.wanted,
        why_wanted=keeper.why_wanted,
        min_replicas=config.min_replicas,
        max_replicas=config.most_replicas,
        replicas=_replicas(seen.nodes, keeper, demand),
        at_gateways=demand.at_gateways,
        waiting_for=demand.waiting_for,
        tokens_per_second=seen.rates.of(name, set(seen.reports)),
    )
    if keeper.record.pinned is not None:
        found.pinned = keeper.record.pinned
    return found


def _state(keeper: Keeper) -> str:
    phases = [slot.phase for slot in keeper.slots]
    revision = keeper.deployment.engine_revision
    if any(slot.deployment.engine_revision != revision for slot in keeper.slots):
        return "updating"
    if Phase.SERVING in phases:
        return "ready"
    if phases and all(phase is Phase.FAILED for phase in phases):
        return "failed"
    return "starting" if keeper.wanted else "sleeping"


def _replicas(nodes: Nodes, keeper: Keeper, demand: Demand) -> list[pb.ReplicaStatus]:
    found = []
    for slot in sorted(keeper.slots, key=lambda slot: slot.index):
        load = demand.replicas.get(slot.entry.key) if slot.entry is not None else None
        found.append(
            pb.ReplicaStatus(
                slot=slot.index,
                epoch=slot.epoch,
                phase=slot.phase.name.lower(),
                seconds=slot.seconds,
                nodes=slot.nodes,
                failure=str(slot.failure) if slot.failure is not None else "",
                running=load.running if load is not None else 0,
                waiting=load.waiting if load is not None else 0,
                usage=load.pages_used / load.pages_total if load is not None and load.pages_total else 0.0,
                outdated=not keeper.is_wanted(slot, nodes.leaving),
            )
        )
    return found
