"""One replica's place in a deployment: placed, started, watched, and after a failure started again."""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from quire_engine.errors import EngineFailure, QuireError
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from quire_cluster.deployment import Deployment
from quire_cluster.liveness import LivenessProbe, has_controller, while_alive
from quire_cluster.policies.lease import more_patience
from quire_cluster.policies.reconcile import Phase, SlotView
from quire_cluster.policies.restart import Restarts
from quire_cluster.replica_actor import Place, Replica, ReplicaFacts
from quire_cluster.routing_table import ReplicaEntry
from quire_cluster.workers import Hang, root_cause

log = logging.getLogger(__name__)
_GROUPS = "quire:"  # what the names of all our placement groups begin with
_LOOK = 0.1  # seconds between looks whether something has a place
_STOP = 5.0  # seconds that a replica gets to stop by itself


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What each worker of a deployment gets on this cluster."""

    gpu: bool
    threads: int


class Placements:
    """Placement groups: made, waited for with one look at all of them, and given back."""

    def __init__(self, cluster: str) -> None:
        """The name of a cluster tells its groups from those of others in the same Ray."""
        self._prefix = f"{_GROUPS}{cluster}:"
        self._waiting: dict[str, asyncio.Future[list[str]]] = {}
        self._looking: asyncio.Task[None] | None = None

    async def make(self, deployment: Deployment, needs: Needs) -> tuple[PlacementGroup, str]:
        """Asks for room; the group, and its name. A stage is one bundle and so on one host; stages come together where
        they can."""
        ranks, stages = deployment.engine.tensor_parallel_size, deployment.engine.pipeline_parallel_size
        bundle = {"CPU": float(ranks)} | ({"GPU": float(ranks)} if needs.gpu else {})
        name = f"{self._prefix}{uuid.uuid4().hex[:12]}"
        making = asyncio.ensure_future(
            asyncio.to_thread(placement_group, [bundle] * stages, strategy="PACK", name=name, lifetime="detached")
        )
        try:
            return await asyncio.shield(making), name
        except asyncio.CancelledError:  # who asked has ended, and will not give back what Ray makes all the same
            loop = asyncio.get_running_loop()
            making.add_done_callback(lambda made: loop.run_in_executor(None, remove_placement_group, made.result()))
            raise

    async def nodes(self, group: PlacementGroup) -> list[str]:
        """The node of each bundle, once there is room for all. Raises EngineFailure for a group that is gone."""
        identity = group.id.hex()
        found = self._waiting[identity] = asyncio.get_running_loop().create_future()
        if self._looking is None or self._looking.done():
            self._looking = asyncio.ensure_future(self._look())
        try:
            return await found
        finally:
            self._waiting.pop(identity, None)

    async def _look(self) -> None:
        while self._waiting:
            try:
                table = await asyncio.to_thread(placement_group_table)
            except Exception:  # Ray's head may be away for a while; whoever waits goes on waiting
                log.exception("placement groups cannot be looked at; it is tried again")
                table = {}
            for identity, future in list(self._waiting.items()):
                entry = table.get(identity)
                if entry is None or future.done():
                    continue
                if entry["state"] == "CREATED":
                    nodes = entry["bundles_to_node_id"]
                    future.set_result([str(nodes[bundle]) for bundle in sorted(nodes)])
                elif entry["state"] == "REMOVED":
                    future.set_exception(EngineFailure("the room of a replica was taken away"))
            await asyncio.sleep(_LOOK)

    async def remove(self, name: str) -> None:
        """Gives it back, with all that runs there. One that is gone already is none."""

        def work() -> None:
            with contextlib.suppress(ValueError):
                remove_placement_group(get_placement_group(name))

        await asyncio.to_thread(work)

    async def names(self) -> list[str]:
        """Of all that hold, or wait for, room."""
        return [name for name in await self._all() if name.startswith(self._prefix)]

    async def remove_orphans(self) -> None:
        """Of clusters whose controller is gone for good: of a server that was killed, say."""
        for name in await self._all():
            cluster = name.removeprefix(_GROUPS).rpartition(":")[0]
            if not await asyncio.to_thread(has_controller, cluster):
                log.warning("room is given back that a cluster held which is gone (%s)", cluster)
                await self.remove(name)

    async def _all(self) -> list[str]:
        table = await asyncio.to_thread(placement_group_table)
        return [
            entry["name"]
            for entry in table.values()
            if entry["name"].startswith(_GROUPS) and entry["state"] != "REMOVED"
        ]


@dataclass(frozen=True, kw_only=True)
class Home:
    """What the slots of a cluster share."""

    namespace: str
    host: str | None  # that replicas listen on; None: their node's address
    secret: str = field(repr=False)
    placements: Placements
    addresses: Callable[[str], Awaitable[str | None]]  # of a node, as others see it


def replica_name(deployment: str, index: int, epoch: int) -> str:
    """Of its actor."""
    return f"replica:{index}:{epoch}:{deployment}"


class Slot:
    """A place, with a replica or none. It is of one revision of its deployment for good."""

    def __init__(
        self,
        deployment: Deployment,
        index: int,
        home: Home,
        needs: Needs,
        *,
        changed: Callable[[], None],
        next_epoch: Callable[[], int],
    ) -> None:
        """`changed` is called after anything here did; `next_epoch` gives each life of a replica its number."""
        self.deployment = deployment
        self.index = index
        self.epoch = 0
        self.entry: ReplicaEntry | None = None
        self.nodes: list[str] = []
        self.failure: QuireError | None = None  # that ended it last
        self.gone = False  # nothing is left of it
        self._ending = False
        self._home = home
        self._needs = needs
        self._changed = changed
        self._next_epoch = next_epoch
        self._phase = Phase.PLACING
        self._since, self.entered = time.monotonic(), time.time()
        self._patience = 1.0  # of the workers' lease
        self._restarts = Restarts()
        self._actor: Any = None
        self._group = ""  # the name of its placement group
        self._task: asyncio.Task[None] | None = None

    # ---- what is seen of it ---------------------------------------------------------------------------------------

    @property
    def phase(self) -> Phase:
        """Where it is on its way."""
        return self._phase

    @property
    def seconds(self) -> float:
        """In this phase."""
        return time.monotonic() - self._since

    def view(self, *, wanted: bool, requests: int, since_room: float) -> SlotView:
        """For the policy. `since_room`: seconds since another slot gave its room back, which this one may get."""
        seconds = min(self.seconds, since_room)
        return SlotView(index=self.index, phase=self._phase, wanted=wanted, seconds=seconds, requests=requests)

    def _enter(self, phase: Phase) -> None:
        self._phase, self._since, self.entered = phase, time.monotonic(), time.time()
        self._changed()

    # ---- its beginning and its end --------------------------------------------------------------------------------

    def begin(self) -> None:
        """Starts a replica, and keeps one there."""
        self._task = asyncio.ensure_future(self._keep(adopted=None))

    def adopt(self, actor: Any, epoch: int, facts: ReplicaFacts) -> None:
        """Goes on with a replica that an earlier controller started."""
        self._actor, self.epoch, self._group, self.nodes = actor, epoch, facts.place.group, list(facts.place.nodes)
        self._phase = Phase.LOADING
        if facts.address:
            self._serves(facts)
        self._task = asyncio.ensure_future(self._keep(adopted=actor))

    def kill(self) -> None:
        """A gateway has long heard nothing of its replica: it is started again."""
        if self._actor is not None:
            ray.kill(self._actor)

    async def drain(self, seconds: float) -> None:
        """Lets what its replica computes end, for so long, and ends it. What is left then goes on elsewhere."""
        actor = self._actor
        self._leave_task()
        if self.entry is not None:
            self.entry = replace(self.entry, draining=True)
        self._enter(Phase.DRAINING)
        try:
            await while_alive(actor.drain.remote(seconds), LivenessProbe(actor, self.name))
        except Exception as error:  # a replica that dies now has no more to end
            log.warning("%s died while it drained: %s", self.name, root_cause(error))
        await self.end()

    async def end(self) -> None:
        """Stops the replica, if there is one, and gives its room back. Idempotent."""
        if self._ending:
            return
        self._ending = True
        self._leave_task()
        if self.entry is not None:
            try:
                await asyncio.wait_for(self._actor.stop.remote(), _STOP)
            except Exception as error:
                log.warning("%s did not stop by itself and is killed: %s", self.name, root_cause(error))
        await self._remove()
        self.gone = True
        self._changed()

    def _leave_task(self) -> None:
        """The slot's own task ends here, unless it is what calls."""
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
        self._task = None

    # ---- its life -------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """For the log."""
        return f"replica {self.index} of {self.deployment.name} (epoch {self.epoch})"

    async def _keep(self, adopted: Any) -> None:
        """For as long as the slot is wanted."""
        while True:
            served_since: float | None = None
            try:
                if adopted is None:
                    await self._remove()  # what could not be given back before
                    await self._start()
                await self._until_loaded()
                served_since = time.monotonic()
                await self._actor.run.remote()
                cause: QuireError = EngineFailure("its replica was stopped")
            except asyncio.CancelledError:
                raise
            except Exception as error:
                cause = root_cause(error)
            adopted = None
            log.error("%s is gone: %s", self.name, cause)
            self.failure = cause
            service = None if served_since is None else time.monotonic() - served_since
            try:
                await self._remove()
            except Exception:  # Ray's, of any kind: a slot that nobody keeps would be empty for ever
                log.exception("what %s held could not be given back; it is tried again", self.name)
            if isinstance(cause, Hang):
                self._patience = more_patience(self._patience, service or 0.0)
                log.warning("its workers get %g times as long from now on", self._patience)
            pause = self._restarts.failed(service, died=isinstance(cause, EngineFailure))
            if pause is None:
                log.error("%s failed %d loads in a row and is given up", self.name, self._restarts.failed_loads)
                self._enter(Phase.FAILED)
                return
            self._enter(Phase.PAUSED)
            await asyncio.sleep(pause)

    async def _start(self) -> None:
        self.epoch = self._next_epoch()
        self._enter(Phase.PLACING)
        home = self._home
        group, self._group = await home.placements.make(self.deployment, self._needs)
        self.nodes = await home.placements.nodes(group)
        self._enter(Phase.LOADING)
        host = home.host or await home.addresses(self.nodes[0])
        if host is None:
            raise EngineFailure("the node a replica was placed on has left the cluster")
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
        place = Place(group=self._group, nodes=tuple(self.nodes), host=host)
        self._actor = (
            ray.remote(Replica)
            .options(
                name=replica_name(self.deployment.name, self.index, self.epoch),
                namespace=home.namespace,
                lifetime="detached",
                num_cpus=0,
                scheduling_strategy=strategy,
                max_concurrency=64,
            )
            .remote(home.namespace, self.deployment, place, group, self._needs.threads, self._patience, home.secret)
        )

    async def _until_loaded(self) -> None:
        probe = LivenessProbe(self._actor, self.name)
        self._serves(await while_alive(self._actor.loaded.remote(), probe))

    def _serves(self, facts: ReplicaFacts) -> None:
        self.entry = ReplicaEntry(
            self.index, self.epoch, facts.address, facts.max_model_len, facts.load_seconds, self._home.secret
        )
        self.failure = None
        self._enter(Phase.SERVING)

    async def _remove(self) -> None:
        self.entry = None
        self.nodes = []
        if self._actor is not None:
            ray.kill(self._actor)
            self._actor = None
        if self._group:
            await self._home.placements.remove(self._group)
            self._group = ""  # known until then, so that it is tried again
