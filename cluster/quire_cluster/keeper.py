"""One deployment at the controller: its slots, and what is done so that they become what is wanted."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

from quire_engine.errors import InvalidParameter

from quire_cluster.demand import Demand, Observer
from quire_cluster.deployment import Deployment
from quire_cluster.policies.reconcile import Act, Phase, actions
from quire_cluster.policies.scaling import Rules, Scaling
from quire_cluster.replica_actor import ReplicaFacts
from quire_cluster.routing_table import Key, RoutingTable, Served
from quire_cluster.slot import Home, Slot
from quire_cluster.store import Record, Store

log = logging.getLogger(__name__)


class Keeper:
    """Of one deployment. `reconcile` is called again and again."""

    def __init__(
        self,
        record: Record,
        home: Home,
        store: Store,
        *,
        changed: Callable[[], None],
        begin: Callable[[Coroutine[Any, Any, Any]], object],
    ) -> None:
        """`changed` is called after anything here did; `begin` has something go on beside."""
        self.record = record
        self.slots: list[Slot] = []
        self.why_wanted = ""
        self.wanted = 0
        self._observer = Observer()
        self._scaling = Scaling()
        self._home = home
        self._store = store
        self._changed = changed
        self._begin = begin
        self._forgotten = False
        self._room_came = 0.0  # when a slot last gave its room back

    @property
    def deployment(self) -> Deployment:
        """As it should be."""
        return self.record.deployment

    # ---- what is wanted -------------------------------------------------------------------------------------------

    def change(self, record: Record) -> None:
        """Other options, or the same again: then what was given up is tried again, since who asks has mended it."""
        self.record = record
        for slot in self.slots:
            if slot.phase is Phase.FAILED:
                self._begin(slot.end())

    async def pin(self, replicas: int | None) -> None:
        """So many from now on, whatever the load; None: as the load asks for."""
        self.record = replace(self.record, pinned=replicas)
        await self.save()

    def is_wanted(self, slot: Slot, leaving: frozenset[str]) -> bool:
        """With today's options, on nodes that stay."""
        alike = slot.deployment.engine_revision == self.deployment.engine_revision
        return alike and not leaving.intersection(slot.nodes)

    async def save(self) -> None:
        """Keeps what is known now."""
        if not self._forgotten:
            await self._store.write(self.record)

    async def forget(self) -> None:
        """The deployment is no more: nothing is kept of it, whatever was still to be."""
        self._forgotten = True
        await self._store.delete(self.deployment.name)

    # ---- what is done ---------------------------------------------------------------------------------------------

    def reconcile(self, demand: Demand, leaving: frozenset[str]) -> None:
        """Starts, drains and kills replicas as the policy says."""
        now = time.monotonic()
        there = [slot for slot in self.slots if not slot.gone]
        if len(there) < len(self.slots):
            self._room_came = now
        self.slots = there
        self.wanted = self._replicas(now, demand)
        since = now - self._room_came
        views = [
            slot.view(wanted=self.is_wanted(slot, leaving), requests=_requests(slot, demand), since_room=since)
            for slot in self.slots
        ]
        by_index = {slot.index: slot for slot in self.slots}
        for act, index in actions(self.wanted, views):
            if act is Act.START:
                self.slots.append(self._slot(self.deployment, index))
                self.slots[-1].begin()
            elif act is Act.DRAIN:
                self._drain(by_index[index])
            else:
                self._begin(by_index[index].end())

    def _replicas(self, now: float, demand: Demand) -> int:
        """How many there should be, and why."""
        config, pinned = self.deployment.config, self.record.pinned
        rules = Rules(
            min_replicas=config.min_replicas,
            max_replicas=config.most_replicas,
            target_backlog=config.target_backlog,
            idle_seconds=config.idle_seconds,
        )
        taking = [slot for slot in self.slots if slot.phase is Phase.SERVING and slot.entry is not None]
        starting = [slot for slot in self.slots if slot.phase in (Phase.PAUSED, Phase.PLACING, Phase.LOADING)]
        observed = self._observer.look(
            now,
            demand,
            [(slot.entry.key, slot.seconds) for slot in taking if slot.entry is not None],
            starting=len(starting),
            start_seconds=self.record.load_seconds,
        )
        by_load = self._scaling.wanted(rules, observed)
        self.why_wanted = self._scaling.reason if pinned is None else "an operator asked for so many"
        return by_load if pinned is None else pinned

    def _slot(self, deployment: Deployment, index: int) -> Slot:
        changed, epoch = self._changed, self._next_epoch
        return Slot(deployment, index, self._home, self.record.needs, changed=changed, next_epoch=epoch)

    def _next_epoch(self) -> int:
        self.record = replace(self.record, epoch=self.record.epoch + 1)
        self._begin(self.save())
        return self.record.epoch

    def adopt(self, index: int, epoch: int, actor: Any, facts: ReplicaFacts) -> Slot:
        """Goes on with a replica that a controller before this one started."""
        slot = self._slot(facts.deployment, index)
        slot.adopt(actor, epoch, facts)
        self.slots.append(slot)
        self.record = replace(self.record, epoch=max(self.record.epoch, epoch))
        if facts.draining:
            self._drain(slot)
        return slot

    def drain_replica(self, index: int) -> None:
        """It ends once what it computes has; another one takes its place. One that drains already does so. Raises
        InvalidParameter."""
        slot = next((slot for slot in self.slots if slot.index == index), None)
        if slot is None or slot.phase not in (Phase.SERVING, Phase.DRAINING):
            serving = [str(slot.index) for slot in self.slots if slot.phase is Phase.SERVING]
            there = f"those that do are {', '.join(serving)}" if serving else "none does"
            raise InvalidParameter(f"{self.deployment.name} has no replica {index} that serves; {there}", "replica")
        if slot.phase is Phase.SERVING:
            self._drain(slot)

    def drain_all(self) -> None:
        """The deployment is no more."""
        for slot in self.slots:
            if slot.phase is Phase.SERVING:
                self._drain(slot)
            elif slot.phase is not Phase.DRAINING:
                self._begin(slot.end())

    def _drain(self, slot: Slot) -> None:
        self._begin(slot.drain(self.deployment.config.drain_timeout))

    async def end(self) -> None:
        """At once."""
        await asyncio.gather(*(slot.end() for slot in self.slots), return_exceptions=True)

    def suspect(self, key: Key) -> None:
        """A gateway has long heard nothing of a replica: it is killed, and so started again."""
        for slot in self.slots:
            if slot.entry is not None and slot.entry.key == key:
                log.error("%s says nothing and is killed", slot.name)
                slot.kill()

    # ---- what is told ---------------------------------------------------------------------------------------------

    def served(self) -> Served:
        """For the routing table."""
        deployment = self.deployment
        tables: dict[str, RoutingTable] = {}
        for slot in self.slots:
            if slot.entry is not None:
                revision = slot.deployment.model_revision
                there = tables.get(revision, RoutingTable()).replicas
                tables[revision] = RoutingTable((*there, slot.entry))
        self._remember()
        table = replace(
            tables.pop(deployment.model_revision, RoutingTable()),
            failure=self._hopeless(),
            slots=frozenset(slot.index for slot in self.slots),
            max_model_len=self.record.max_model_len,
            load_seconds=self.record.load_seconds,
            ready_at=self._ready_at(),
        )
        return Served(deployment, table, tables)

    def _remember(self) -> None:
        """What the first request after a sleep has to know: of the replica that was started last."""
        revision = self.deployment.model_revision
        serving = [slot for slot in self.slots if slot.phase is Phase.SERVING and slot.entry is not None]
        ours = [slot for slot in serving if slot.deployment.model_revision == revision]
        if not ours:
            return
        entry = max(ours, key=lambda slot: slot.epoch).entry
        assert entry is not None, "it serves"
        now = replace(self.record, max_model_len=entry.max_model_len, load_seconds=entry.load_seconds)
        if now != self.record:
            self.record = now
            self._begin(self.save())

    def _hopeless(self) -> str | None:
        """Why there is no replica and none will come, where that is so."""
        if not self.slots or any(slot.phase is not Phase.FAILED for slot in self.slots):
            return None
        return str(self.slots[-1].failure)

    def _ready_at(self) -> float | None:
        """In time.time() seconds: when the first of those that load should serve, if the last one took as long."""
        loading = [slot.entered for slot in self.slots if slot.phase is Phase.LOADING]
        return min(loading) + self.record.load_seconds if loading and self.record.load_seconds else None


def _requests(slot: Slot, demand: Demand) -> int:
    load = demand.replicas.get(slot.entry.key) if slot.entry is not None else None
    return load.running + load.waiting if load is not None else 0
