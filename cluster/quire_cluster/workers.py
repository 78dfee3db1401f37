"""The workers of one replica, as the executor that an engine drives: a plan down the channel, a result back."""

import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any

import ray
from quire_engine.config import EngineConfig, SchedulerLimits
from quire_engine.errors import EngineFailure, ModelError, OutOfMemory, QuireError, ServerError
from quire_engine.step import StepPlan, StepResult
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from quire_cluster.channel import ChannelClosed, StepChannel
from quire_cluster.liveness import LOOK, LivenessProbe
from quire_cluster.local_ray import PrivateCluster, start_private_cluster, workers_on_gpus
from quire_cluster.policies.lease import StepLease
from quire_cluster.worker import Worker

_PREPARATIONS = 2  # at once
_LAST_WORDS = 2.0  # seconds that the other ranks have to say what they met, where one lost its connection to them


class Hang(EngineFailure):
    """The workers showed no life for as long as their lease lasted."""


def _cause(error: BaseException) -> BaseException:
    while isinstance(error, RayTaskError) and error.cause is not None:
        error = error.cause
    return error


def root_cause(error: BaseException) -> QuireError:
    """What a user should read of an error that came through Ray: the cause and its mend, not the way it took."""
    cause = _cause(error)
    if isinstance(cause, QuireError):
        return cause
    if isinstance(cause, RayActorError):
        return EngineFailure("a worker process died")
    if isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError":  # torch's own
        return OutOfMemory(str(cause) or "out of memory")
    return ModelError(f"{type(cause).__name__}: {cause}")


def first_failure(loading: Sequence["Future[Any]"], check: Callable[[], None]) -> QuireError | None:
    """Waits until every rank has loaded, or one has failed: why, and which. The ranks that lose their connection to one
    that dies may be heard first; theirs is not the cause. `check` is called every LOOK seconds; what it raises ends the
    wait."""
    while wait(loading, LOOK, return_when=FIRST_EXCEPTION).not_done and not _failed(loading):
        check()
    failed = _failed(loading)
    if failed and all(_lost_connection(error) for _, error in failed):
        wait(loading, timeout=_LAST_WORDS)
        failed = _failed(loading)
    if not failed:
        return None
    rank, error = min(failed, key=lambda one: _lost_connection(one[1]))
    cause = root_cause(error)
    if len(loading) == 1 or not isinstance(cause, ServerError):
        return cause
    return type(cause)(f"rank {rank}: {cause}")


def _failed(loading: Sequence["Future[Any]"]) -> list[tuple[int, BaseException]]:
    done = [(rank, future.exception()) for rank, future in enumerate(loading) if future.done()]
    return [(rank, error) for rank, error in done if error is not None]


def _lost_connection(error: BaseException) -> bool:
    """Whether this may be how gloo or NCCL report that another rank is gone."""
    return type(_cause(error)).__name__ in ("RuntimeError", "DistBackendError", "DistNetworkError", "DistStoreError")


class Workers:
    """Starts one actor per rank, loads the model, and runs steps. Raises QuireError with the root cause."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        threads: int,
        placement: PlacementGroup | None = None,
        gpus: bool = False,
        patience: float = 1.0,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        """`gpus`: each worker gets one of Ray's. `patience`: of the step lease (`StepLease`)."""
        size, ranks = config.num_workers, config.tensor_parallel_size
        self._dead = threading.Event()
        self._cause: BaseException | None = None
        self._on_death = on_death
        self._closing = False
        self._lease = StepLease(patience)
        self._actors: list[Any] = []
        for rank in range(size):
            strategy = (
                PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=rank // ranks)
                if placement
                else "DEFAULT"
            )
            options = {"num_cpus": 1 if placement else 0, "num_gpus": int(gpus), "max_concurrency": 2 + _PREPARATIONS}
            self._actors.append(
                ray.remote(Worker)
                .options(scheduling_strategy=strategy, runtime_env=_worker_environment(threads), **options)
                .remote(rank)
            )
        self._probes = [
            LivenessProbe(actor, f"rank {rank}", placed=placement is not None)
            for rank, actor in enumerate(self._actors)
        ]
        self._drawing = self._actors[config.drawing_rank]
        self._preparations = ThreadPoolExecutor(_PREPARATIONS, thread_name_prefix="preparations")
        self._channel = StepChannel.create()
        try:
            hosts = self._loaded(actor.host.remote() for actor in self._actors)
            here = ray.get_runtime_context().get_node_id()
            self._remote = [rank for rank, (node, _) in enumerate(hosts) if node != here]
            address = hosts[0][1] if self._remote else "127.0.0.1"
            [port] = self._loaded([self._actors[0].host_store.remote(size, address)]) if size > 1 else [0]
            store = f"{address}:{port}"
            limits = self._loaded(actor.load.remote(config, threads, store, self._remote) for actor in self._actors)
        except BaseException:
            self.close()
            raise
        self.limits: SchedulerLimits = limits[0]
        for rank, actor in enumerate(self._actors):
            path = None if rank in self._remote else self._channel.path
            loop = actor.run.remote(path, os.getpid())
            loop.future().add_done_callback(self._ended)

    def _loaded(self, calls: Iterable[Any]) -> list[Any]:
        """The results of calls of actors, which may take as long as they like while all ranks show life."""
        futures = [call.future() for call in calls]
        if (failure := first_failure(futures, self._check_probes)) is not None:
            raise failure
        return [future.result() for future in futures]

    def _check_probes(self) -> None:
        for probe in self._probes:
            probe.check()

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
        counts = plan.counts.astype(int)
        image_tokens = sum(image.size for image in plan.images.encode) if plan.images is not None else 0
        pairs = int(counts @ (plan.starts + plan.counts))
        self._lease.submit(time.monotonic(), int(counts.sum()), pairs, image_tokens)
        self._channel.send_plan(plan)

    def prepare(self, guidance: str) -> "Future[Any]":
        """See `Executor`."""
        return self._preparations.submit(self._prepare, guidance)

    def _prepare(self, guidance: str) -> None:
        try:
            ray.get(self._drawing.prepare.remote(guidance))
        except Exception as error:  # whatever it is: what is wrong with a worker, its loop says, too
            raise root_cause(error) from error

    def collect(self) -> StepResult:
        """The oldest result that is due. Raises EngineFailure within 0.1 s of a worker's death."""
        self._lease.begin()
        try:
            result: StepResult = self._channel.receive_result(self._alive)
            self._lease.end(time.monotonic())
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
            raise Hang(
                f"the workers made no progress for {self._lease.seconds:.0f} s; rank {behind} is furthest "
                f"behind{elsewhere}"
            )
        return True

    def close(self) -> None:
        """Stops the workers and waits until they are gone. Idempotent."""
        if self._closing:
            return
        self._closing = True
        self._preparations.shutdown(wait=False, cancel_futures=True)
        self._channel.close()
        self._kill()

    def _kill(self) -> None:
        if ray.is_initialized():  # else they ended with it, and asking would start another
            for actor in self._actors:
                ray.kill(actor)


def _worker_environment(threads: int) -> dict[str, Any]:
    return {"env_vars": {"OMP_NUM_THREADS": str(threads)}}


class LocalWorkers(Workers):
    """For offline use: workers in a private cluster of this machine, which those of one process share; or in the one
    that runs in this process already."""

    _cluster: PrivateCluster | None = None
    _users = 0  # of the private cluster, which ends with the last of them
    _changing = threading.Lock()

    def __init__(self, config: EngineConfig) -> None:
        """Raises InvalidParameter where there are GPUs, and fewer than workers."""
        with self._changing:
            if not ray.is_initialized():
                LocalWorkers._cluster = start_private_cluster(num_workers=config.num_workers)
            self._in_private = self._cluster is not None
            LocalWorkers._users += self._in_private
        cores = len(os.sched_getaffinity(0))
        try:
            super().__init__(
                config,
                threads=config.cpu_threads or max(1, cores // config.num_workers),
                gpus=workers_on_gpus(config.device, config.num_workers),
            )
        except BaseException:
            self._leave_cluster()
            raise

    def close(self) -> None:
        """Stops the workers, and the private cluster with the last of them. Idempotent."""
        super().close()
        self._leave_cluster()

    def _leave_cluster(self) -> None:
        with self._changing:
            LocalWorkers._users -= self._in_private
            self._in_private = False
            if self._cluster is not None and not self._users:
                self._cluster.stop()
                LocalWorkers._cluster = None
