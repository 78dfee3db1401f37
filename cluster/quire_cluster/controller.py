"""The controller: the Ray actor that keeps as many replicas running as are wanted, and publishes where they are.

A thin reconcile loop per replica slot: place, start, watch, and after a failure start again under a higher epoch.
"""

import asyncio
import logging
import secrets
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import ray
from quire_engine.config import EngineConfig
from quire_engine.errors import EngineFailure, QuireError
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from quire_cluster.liveness import LivenessProbe, while_alive
from quire_cluster.policies.lease import more_patience
from quire_cluster.policies.restart import Restarts
from quire_cluster.replica import Replica
from quire_cluster.routing_table import Key, ReplicaEntry, RoutingTable
from quire_cluster.workers import Hang, root_cause

log = logging.getLogger(__name__)
_PLACEMENT = 0.1  # seconds between looks whether a replica has a place


@dataclass
class _Slot:
    """What a replica slot holds while it runs."""

    placement: PlacementGroup | None = None
    actor: Any = None
    entry: ReplicaEntry | None = None
    epoch: int = 0
    patience: float = 1.0  # of the workers' lease
    restarts: Restarts = field(default_factory=Restarts)
    given_up: QuireError | None = None  # why it is not started again


class Controller:
    """`watch` is how gateways learn of changes; `shutdown` ends everything."""

    def __init__(
        self, name: str, config: EngineConfig, replicas: int, *, threads: int, gpu: bool, host: str | None
    ) -> None:
        """`name` tells this server's placement groups from those of others on the same Ray cluster."""
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
        self._name = name
        self._config = config
        self._threads = threads
        self._gpu = gpu
        self._host = host
        self._secret = secrets.token_hex(32)  # who may ask for the routing table may open sessions
        self._slots = [_Slot() for _ in range(replicas)]
        self._table = RoutingTable()
        self._changed = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False

    async def start(self) -> None:
        """Begins to reconcile."""
        if not self._tasks:
            self._remove_leftovers()
            self._tasks = [asyncio.ensure_future(self._keep(index)) for index in range(len(self._slots))]

    def _remove_leftovers(self) -> None:
        """Placement groups of a controller that died under this name; its actors died with it."""
        for entry in placement_group_table().values():
            if entry["name"].startswith(self._name) and entry["state"] != "REMOVED":
                remove_placement_group(get_placement_group(entry["name"]))

    async def ping(self) -> None:
        """A sign of life."""

    async def watch(self, version: int) -> RoutingTable:
        """The table, once it is newer than `version`."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._table.version > version)
            return self._table

    async def suspect(self, key: Key) -> None:
        """A gateway has long heard nothing of a replica: it is killed, and so started again."""
        for slot in self._slots:
            if slot.entry is not None and slot.entry.key == key:
                log.error("replica %d (epoch %d) says nothing and is killed", *key[:2])
                ray.kill(slot.actor)

    async def shutdown(self) -> None:
        """Stops every replica and gives its place back."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(self._stop(slot) for slot in self._slots))
        await self._publish()

    async def _stop(self, slot: _Slot) -> None:
        if slot.entry is not None:
            try:
                await asyncio.wait_for(slot.actor.stop.remote(), 5)
            except Exception as error:
                log.warning("a replica did not stop by itself and is killed: %s", root_cause(error))
        self._remove(slot)

    async def _keep(self, index: int) -> None:
        """One slot, for as long as the controller lives."""
        slot = self._slots[index]
        while not self._stopping:
            serves_since: float | None = None
            try:
                self._remove(slot)  # what could not be given back before
                await self._start(index, slot)
                serves_since = time.monotonic()
                await slot.actor.run.remote()
                return  # it was stopped
            except asyncio.CancelledError:
                raise
            except Exception as error:
                cause = root_cause(error)
                log.error("replica %d (epoch %d) is gone: %s", index, slot.epoch, cause)
            service = None if serves_since is None else time.monotonic() - serves_since
            try:
                self._remove(slot)
            except Exception:  # Ray's, of any kind: a slot that nobody keeps would be empty for ever
                log.exception("what replica %d held could not be given back; it is tried again", index)
            if isinstance(cause, Hang):
                slot.patience = more_patience(slot.patience, service or 0.0)
                log.warning("its workers get %g times as long from now on", slot.patience)
            pause = slot.restarts.failed(service, died=isinstance(cause, EngineFailure))
            if pause is None:
                slot.given_up = cause
                log.error("replica %d failed %d loads in a row and is given up", index, slot.restarts.failed_loads)
                await self._publish()
                return
            await self._publish()
            await asyncio.sleep(pause)

    async def _start(self, index: int, slot: _Slot) -> None:
        started = time.monotonic()
        ranks, stages = self._config.tensor_parallel_size, self._config.pipeline_parallel_size
        bundle = {"CPU": float(ranks)} | ({"GPU": float(ranks)} if self._gpu else {})
        # A stage is one bundle and so on one host; stages come together where there is room.
        slot.placement = placement_group(
            [bundle] * stages, strategy="PACK", name=f"{self._name}-{uuid.uuid4().hex[:12]}"
        )
        slot.epoch += 1
        node = await _node_of(slot.placement)
        strategy = PlacementGroupSchedulingStrategy(slot.placement, placement_group_bundle_index=0)
        slot.actor = (
            ray.remote(Replica)
            .options(num_cpus=0, scheduling_strategy=strategy, max_concurrency=64)
            .remote(f"replica-{index}")
        )
        host = self._host or _address_of(node)
        address, max_model_len = await while_alive(
            slot.actor.start.remote(self._config, self._threads, slot.placement, host, slot.patience, self._secret),
            LivenessProbe(slot.actor, f"replica {index}"),
        )
        load_seconds = time.monotonic() - started
        slot.entry = ReplicaEntry(index, slot.epoch, address, max_model_len, load_seconds, self._secret)
        await self._publish()

    def _remove(self, slot: _Slot) -> None:
        slot.entry = None
        if slot.actor is not None:
            ray.kill(slot.actor)
            slot.actor = None
        if slot.placement is not None:
            remove_placement_group(slot.placement)
            slot.placement = None

    async def _publish(self) -> None:
        async with self._changed:
            entries = tuple(slot.entry for slot in self._slots if slot.entry is not None)
            hopeless = [slot.given_up for slot in self._slots if slot.given_up is not None]
            failure = str(hopeless[-1]) if len(hopeless) == len(self._slots) else None
            self._table = RoutingTable(self._table.version + 1, entries, failure)
            self._changed.notify_all()


async def _node_of(placement: PlacementGroup) -> str:
    """The node of the first bundle, once there is room for all of them."""
    while (entry := placement_group_table(placement))["state"] != "CREATED":
        await asyncio.sleep(_PLACEMENT)
    return str(entry["bundles_to_node_id"][0])


def _address_of(node: str) -> str:
    """As other nodes see it."""
    for entry in ray.nodes():
        if entry["NodeID"] == node:
            return str(entry["NodeManagerAddress"])
    raise EngineFailure("the node a replica was placed on has left the cluster")
