"""The actor in which a replica runs: its start, its draining and its end."""

import asyncio
import logging
import time
from dataclasses import dataclass, replace

from quire_engine.errors import QuireError
from ray.util.placement_group import PlacementGroup, remove_placement_group

from quire_cluster.addresses import with_port
from quire_cluster.deployment import Deployment
from quire_cluster.liveness import end_with_controller
from quire_cluster.replica import EngineService, EngineThread, session_server
from quire_cluster.workers import Workers

_LOOK = 0.05  # seconds between looks whether anything is left


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a replica runs: its placement group's name, the nodes of that, and the host that it listens on."""

    group: str
    nodes: tuple[str, ...]
    host: str


@dataclass(frozen=True, kw_only=True)
class ReplicaFacts:
    """What a controller asks of a replica that an earlier one started."""

    deployment: Deployment
    place: Place
    address: str = ""  # of its session service; "": it loads
    max_model_len: int = 0  # the engine's context
    load_seconds: float = 0.0
    draining: bool = False


class Replica:
    """The actor. `loaded` returns once it serves, `run` when it was stopped; both raise what it failed with. It ends by
    itself once its controller is gone for good."""

    def __init__(
        self,
        namespace: str,
        deployment: Deployment,
        place: Place,
        group: PlacementGroup,
        threads: int,
        patience: float,
        secret: str,
    ) -> None:
        """Begins to start the workers (`patience`: of their lease) and then the session service, for who sends
        `secret`. Ray calls it on the actor's event loop."""
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
        self._facts = ReplicaFacts(deployment=deployment, place=place)
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._loading = asyncio.ensure_future(self._load(group, threads, patience, secret))
        self._orphaned = asyncio.ensure_future(end_with_controller(namespace, lambda: remove_placement_group(group)))

    async def _load(self, group: PlacementGroup, threads: int, patience: float, secret: str) -> None:
        began = time.monotonic()
        loop = asyncio.get_running_loop()
        self._workers = await loop.run_in_executor(
            None,
            lambda: Workers(
                self._facts.deployment.engine,
                threads=threads,
                placement=group,
                gpus="GPU" in group.bundle_specs[0],
                patience=patience,
                on_death=self._worker_died,
            ),
        )
        self._engine = EngineThread(self._workers, loop, self._failed)
        self._service = EngineService(self._engine)
        self._server = session_server(self._service, secret)
        port = self._server.add_insecure_port(with_port(self._facts.place.host, 0))
        await self._server.start()
        self._engine.start()
        self._facts = replace(
            self._facts,
            address=with_port(self._facts.place.host, port),
            max_model_len=self._engine.max_model_len,
            load_seconds=time.monotonic() - began,
        )

    async def loaded(self) -> ReplicaFacts:
        """Once it serves. Raises why it cannot."""
        await asyncio.shield(self._loading)
        return self._facts

    async def facts(self) -> ReplicaFacts:
        """As of now."""
        return self._facts

    async def ping(self) -> None:
        """A sign of life, while it loads too."""

    def _worker_died(self) -> None:
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.wake()

    def _failed(self, error: QuireError) -> None:
        self._failing = asyncio.ensure_future(self._fail(error))

    async def _fail(self, error: QuireError) -> None:
        await self._service.hang_up(str(error))
        if not self._ended.done():
            self._ended.set_exception(error)

    async def run(self) -> None:
        """Until `stop` (returns) or a failure (raises what it was)."""
        await asyncio.shield(self._ended)

    async def drain(self, seconds: float) -> None:
        """Takes nothing new, and returns when all that it had has ended, or after `seconds`."""
        self._service.accepting = False
        self._facts = replace(self._facts, draining=True)
        until = time.monotonic() + seconds
        while self._engine.num_requests and time.monotonic() < until:
            await asyncio.sleep(_LOOK)

    async def stop(self) -> None:
        """Ends the engine, its workers and its sessions."""
        self._service.accepting = False
        await self._service.hang_up()
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, self._engine.stop)
        await loop.run_in_executor(None, self._workers.close)
        await self._server.stop(0.2)
        if not self._ended.done():
            self._ended.set_result(None)
