"""A worker: the actor that owns one GPU (or a share of the CPU's cores) and runs one rank's slice of the model."""

import logging
import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from quire_engine.config import EngineConfig, SchedulerLimits

from quire_cluster.channel import ChannelClosed, StepChannel, parent_lives

if TYPE_CHECKING:
    from quire_cluster.relay import RelayingChannel, RemoteChannel

log = logging.getLogger(__name__)


class Worker:
    """Its methods are called by the replica that made it: `host_store` (rank 0), `load`, then `run` until the end.

    What needs torch is imported in them: controller and replica import this class, and do without.
    """

    def __init__(self, rank: int) -> None:
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
        self._rank = rank
        # Loading and running share one thread: OpenMP keeps a pool per calling thread, and with more pooled threads
        # than cores they sleep instead of spinning between operators, which makes a step half as fast.
        self._compute = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._store: Any = None
        self._runner: Any = None
        self._group: Any = None
        self._remote: list[int] = []

    def host_store(self, size: int, address: str) -> int:
        """Opens the rendezvous of the group at an address of this host, and returns its port."""
        from quire_engine.parallel import ParallelGroup

        self._store = ParallelGroup.host_store(size, address)
        return int(self._store.port)

    def host(self) -> tuple[str, str]:
        """The node that this worker is on, and its address."""
        import ray

        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()

    def ping(self) -> None:
        """A sign of life, on another thread than the one that waits for what is loaded."""

    def load(self, config: EngineConfig, threads: int, store: str, remote: list[int]) -> SchedulerLimits:
        """Joins the group at `store` (address:port) and loads this rank's slice. `remote`: ranks on other hosts."""
        return self._compute.submit(self._load, config, threads, store, remote).result()

    def prepare(self, guidance: str) -> None:
        """Compiles what an output has to look like, in threads beside the step loop. Raises InvalidParameter."""
        self._runner.prepare(guidance).result()

    def run(self, channel_path: str | None, replica: int) -> None:
        """The step loop. Returns when the channel closes or the replica is gone; raises what a step raises.

        Without a channel's path the worker is on another host than the replica, and rank 0 relays.
        """
        self._compute.submit(self._run, channel_path, replica).result()

    def _load(self, config: EngineConfig, threads: int, store: str, remote: list[int]) -> SchedulerLimits:
        from quire_engine.execution.runner import ModelRunner
        from quire_engine.memory.plan import resolve_device, resolve_dtype
        from quire_engine.parallel import ParallelGroup
        from quire_engine.weights.resolve import find_model
        from ray import get_gpu_ids
        from ray.experimental import tqdm_ray

        if gpus := get_gpu_ids():
            log.info("rank %d has GPU %s", self._rank, gpus[0])
        niceness = os.nice(0)
        if niceness > os.getpriority(os.PRIO_PROCESS, os.getppid()):  # than the raylet's own: Ray has set it
            log.warning(
                "rank %d runs at nice %d: whatever else its host does comes first; start Ray there with "
                "RAY_worker_niceness=0 in its environment",
                self._rank,
                niceness,
            )
        files = find_model(config)
        device = resolve_device(config)
        group = ParallelGroup.join(
            self._rank,
            config.tensor_parallel_size,
            config.pipeline_parallel_size,
            store.rpartition(":")[0],
            int(store.rpartition(":")[2]),
            device,
            dtype=resolve_dtype(config, files.config.get("dtype") or files.config.get("torch_dtype"), device),
            experts_apart=config.enable_expert_parallel,
            deterministic=config.deterministic,
            across_hosts=bool(remote),
        )
        self._group, self._remote = group, remote
        self._runner = ModelRunner(config, files, group, threads=threads, progress_bar=tqdm_ray.tqdm)
        self._runner.read_vocabulary()
        limits: SchedulerLimits = self._runner.limits
        return limits

    def _channel(self, path: str | None) -> "StepChannel | RemoteChannel | RelayingChannel":
        from quire_cluster.relay import RelayingChannel, RemoteChannel

        if path is None:
            return RemoteChannel(self._group.control)
        channel = StepChannel.open(path)
        if self._rank or not self._remote:
            return channel
        drawing = self._group.drawing_rank
        return RelayingChannel(channel, self._group.control, self._remote, drawing if drawing in self._remote else None)

    def _run(self, channel_path: str | None, replica: int) -> None:
        """A step whose result is not ready goes to a thread that waits for it: the next one is launched meanwhile."""
        channel = self._channel(channel_path)
        alive = parent_lives(replica)
        execute, rank = self._runner.execute, self._rank
        self._runner.on_progress(lambda: channel.mark(rank))
        with ThreadPoolExecutor(1, thread_name_prefix="results") as results:
            sending: Future[None] | None = None
            try:
                while True:
                    step = execute(channel.receive_plan(alive))
                    if step is None:
                        continue
                    if step.ready and (sending is None or sending.done()):
                        channel.send_result(step.result())
                    else:
                        sending = results.submit(_send, channel, step)
            except ChannelClosed:
                if sending is not None:
                    sending.result()  # raises what it failed with


def _send(channel: "StepChannel | RemoteChannel | RelayingChannel", step: Any) -> None:
    try:
        channel.send_result(step.result())
    except BaseException:
        channel.close()
        raise
