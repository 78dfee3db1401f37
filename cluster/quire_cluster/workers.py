"""The workers of one replica, as the executor that an engine drives: a plan down the channel, a result back."""

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from quire_engine.config import EngineConfig, SchedulerLimits
from quire_engine.errors import EngineFailure, ModelError, OutOfMemory, QuireError
from quire_engine.execution.plan import StepPlan, StepResult
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from quire_cluster.channel import ChannelClosed, StepChannel
from quire_cluster.local_ray import start_private_cluster
from quire_cluster.policies.lease import StepLease
from quire_cluster.worker import Worker


def root_cause(error: BaseException) -> QuireError:
    """What a user should read of an error that came through Ray: the cause and its mend, not the way it took."""
    cause: BaseException = error
    while isinstance(cause, RayTaskError) and cause.cause is not None:
        cause = cause.cause
    if isinstance(cause, QuireError):
        return cause
    if isinstance(cause, RayActorError):
        return EngineFailure("a worker process died")
    if isinstance(cause, MemoryError):
        return OutOfMemory(str(cause) or "out of memory")
    return ModelError(f"{type(cause).__name__}: {cause}")


class Workers:
    """Starts one actor per rank, loads the model, and runs steps. Raises QuireError with the root cause."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        threads: int,
        placement: PlacementGroup | None = None,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        size, ranks = config.num_workers, config.tensor_parallel_size
        self._dead = threading.Event()
        self._cause: BaseException | None = None
        self._on_death = on_death
        self._closing = False
        self._lease = StepLease()
        gpus = 1 if placement is not None and "GPU" in placement.bundle_specs[0] else 0
        self._actors: list[Any] = []
        for rank in range(size):
            strategy = (
                PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=rank // ranks)
                if placement
                else "DEFAULT"
            )
            options = {"num_cpus": 1 if placement else 0, "num_gpus": gpus, "max_concurrency": 2}
            self._actors.append(
                ray.remote(Worker)
                .options(scheduling_strategy=strategy, runtime_env=_worker_environment(threads), **options)
                .remote(rank)
            )
        self._channel = StepChannel.create()
        try:
            hosts = [actor.host.remote().future().result() for actor in self._actors]
            here = ray.get_runtime_context().get_node_id()
            self._remote = [rank for rank, (node, _) in enumerate(hosts) if node != here]
            port = self._actors[0].host_store.remote(size).future().result() if size > 1 else 0
            address = hosts[0][1] if self._remote else "127.0.0.1"
            loading = [actor.load.remote(config, threads, f"{address}:{port}", self._remote) for actor in self._actors]
            loaded = [reference.future().result() for reference in loading]
        except Exception as error:
            self._kill()
            raise root_cause(error) from error
        self.limits: SchedulerLimits = loaded[0]
        for rank, actor in enumerate(self._actors):
            path = None if rank in self._remote else self._channel.path
            loop = actor.run.remote(path, os.getpid())
            loop.future().add_done_callback(self._ended)

    def _ended(self, future: Any) -> None:
        """A worker's loop never ends by itself: whatever ends it ends the replica. Runs on a thread of Ray's."""
        if not self._closing:
            self._cause = future.exception()
            self._dead.set()
            self._on_death()

    @property
    def failure(self) -> EngineFailure | None:
        """Why no further step can run, if so."""
        if not self._dead.is_set():
            return None
        cause = self._cause
        if isinstance(cause, RayTaskError):
            return EngineFailure(f"a worker failed: {root_cause(cause)}")
        return EngineFailure("a worker process died")

    def submit(self, plan: StepPlan) -> None:
        """Hands a step to the workers, which may still be at the one before it."""
        self._channel.send_plan(plan)

    def collect(self) -> StepResult:
        """The oldest result that is due. Raises EngineFailure within 0.1 s of a worker's death."""
        self._lease.begin(time.monotonic())
        try:
            result: StepResult = self._channel.receive_result(self._alive)
            self._lease.end()
        except ChannelClosed as error:
            raise self.failure or EngineFailure("the step channel was closed") from error
        return result

    def _alive(self) -> bool:
        """Asked while a result is due."""
        if self._dead.is_set():
            return False
        progress = self._channel.progress(len(self._actors))
        behind = self._lease.check(time.monotonic(), progress)
        if behind is not None:
            elsewhere = f" (ranks {self._remote} are on other hosts)" if self._remote else ""
            raise EngineFailure(
                f"the workers made no progress for {self._lease.seconds:.0f} s; rank {behind} is furthest "
                f"behind{elsewhere}"
            )
        return True

    def close(self) -> None:
        """Stops the workers and waits until they are gone."""
        self._closing = True
        self._channel.close()
        self._kill()

    def _kill(self) -> None:
        for actor in self._actors:
            ray.kill(actor)


def _worker_environment(threads: int) -> dict[str, Any]:
    return {"env_vars": {"OMP_NUM_THREADS": str(threads)}}


class LocalWorkers(Workers):
    """For offline use: workers in a private cluster of this machine, started if none is running in this process."""

    def __init__(self, config: EngineConfig) -> None:
        self._own_cluster = None
        if not ray.is_initialized():
            self._own_cluster = start_private_cluster(num_workers=config.num_workers)
        cores = len(os.sched_getaffinity(0))
        try:
            super().__init__(config, threads=config.cpu_threads or max(1, cores // config.num_workers))
        except BaseException:
            self._stop_cluster()
            raise

    def close(self) -> None:
        """Stops the workers, and the cluster if it was started for them."""
        super().close()
        self._stop_cluster()

    def _stop_cluster(self) -> None:
        if self._own_cluster is not None:
            self._own_cluster.stop()
            self._own_cluster = None
