"""The gateways of a cluster, on the head or on all nodes that it uses: each an actor of its own, started again where it
ends."""

import asyncio
import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from quire_engine.errors import InvalidParameter, QuireError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from quire_cluster.config import GatewayConfig
from quire_cluster.gateway_actor import GatewayActor
from quire_cluster.governance.config import Governance
from quire_cluster.keys import Keys
from quire_cluster.policies.hosts import Hosts
from quire_cluster.policies.restart import Restarts
from quire_cluster.workers import root_cause

log = logging.getLogger(__name__)
_STOP = 5.0  # seconds beyond its draining that a gateway gets to end


@dataclass(frozen=True, kw_only=True)
class GatewayPlan:
    """Which there are."""

    config: GatewayConfig
    access: Keys | Governance | None  # who may call; None: everybody
    per_node: int
    everywhere: bool  # where replicas are, too; else on the head alone


class _Place:
    """One gateway's, on one node."""

    def __init__(self, name: str, node: str, namespace: str, plan: GatewayPlan, actor: Any) -> None:
        """`actor`: one that is there already."""
        self.name = name
        self.node = node
        self.failure: QuireError | None = None
        self.answered = asyncio.Event()
        self._namespace = namespace
        self._plan = plan
        self._actor = actor
        self._restarts = Restarts()
        self._task = asyncio.ensure_future(self._keep())

    @property
    def actor(self) -> Any:
        """As of now; None between two."""
        return self._actor

    async def _keep(self) -> None:
        while True:
            served_since: float | None = None
            loop = asyncio.get_running_loop()
            try:
                if self._actor is None:
                    self._actor = self._make()
                await self._actor.started.remote()
                served_since, self.failure = loop.time(), None
                self.answered.set()
                await self._actor.run.remote()
                log.info("gateway %s was stopped", self.name)
            except Exception as error:
                self.failure = root_cause(error)
                log.error("gateway %s is gone: %s", self.name, self.failure)
                if isinstance(self.failure, InvalidParameter):
                    self.answered.set()
            self.kill()
            service = None if served_since is None else loop.time() - served_since
            pause = self._restarts.failed(service, died=True)
            await asyncio.sleep(60.0 if pause is None else pause)

    def _make(self) -> Any:
        return (
            ray.remote(GatewayActor)
            .options(
                name=self.name,
                namespace=self._namespace,
                lifetime="detached",
                num_cpus=0,
                max_concurrency=1000,
                scheduling_strategy=NodeAffinitySchedulingStrategy(self.node, soft=False),
            )
            .remote(self.name, self._namespace, self._plan.config, self._plan.access)
        )

    def kill(self) -> None:
        """It is started again."""
        if self._actor is not None:
            ray.kill(self._actor)
            self._actor = None

    async def end(self, drain_seconds: float | None) -> None:
        """Once what runs there has finished, or the time for that is over."""
        self._task.cancel()
        if self._actor is None:
            return
        most = self._plan.config.shutdown_timeout if drain_seconds is None else drain_seconds
        try:
            await asyncio.wait_for(self._actor.stop.remote(drain_seconds), most + _STOP)
        except Exception as error:
            log.warning("gateway %s did not stop by itself and is killed: %s", self.name, root_cause(error))
        self.kill()


class Gateways:
    """`reconcile` has one at every place where one should be."""

    def __init__(self, plan: GatewayPlan, namespace: str) -> None:
        self._plan = plan
        self._namespace = namespace
        self._places: dict[str, _Place] = {}
        self._hosts = Hosts()
        self._ending: set[asyncio.Task[None]] = set()

    def adopt(self, name: str, actor: Any) -> None:
        """One that a controller before this one started."""
        _, node, _ = name.split(":")
        self._places[name] = _Place(name, node, self._namespace, self._plan, actor)

    def reconcile(
        self,
        nodes: Sequence[str],
        head: str,
        leaving: frozenset[str],
        silent: Sequence[str],
        busy: Collection[str],
    ) -> None:
        """`silent`: those whose reports have stopped. `busy`: nodes that have replicas."""
        used = self._hosts.of(nodes, head, busy, time.monotonic()) if self._plan.everywhere else [head]
        hosts = [node for node in used if node not in leaving]
        wanted = {f"gateway:{node}:{number}": node for node in hosts for number in range(self._plan.per_node)}
        for name, node in wanted.items():
            if name not in self._places:
                self._places[name] = _Place(name, node, self._namespace, self._plan, None)
        for name in self._places.keys() - wanted.keys():
            self._begin_end(self._places.pop(name), None)
        for name, place in self._places.items():
            if place.actor is not None and name in silent:
                log.error("gateway %s says nothing and is killed", name)
                place.kill()

    def _begin_end(self, place: _Place, drain_seconds: float | None) -> None:
        task = asyncio.ensure_future(place.end(drain_seconds))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def answered(self) -> None:
        """Once all of them have. Raises why one cannot: InvalidParameter where its port is taken."""
        for place in list(self._places.values()):
            await place.answered.wait()
            if place.failure is not None:
                raise place.failure

    @property
    def actors(self) -> dict[str, Any]:
        """Of those that are there, by their names."""
        return {name: place.actor for name, place in self._places.items() if place.actor is not None}

    async def stop(self, drain_seconds: float | None) -> None:
        """All of them, at once."""
        places, self._places = list(self._places.values()), {}
        await asyncio.gather(*(place.end(drain_seconds) for place in places), *self._ending)
