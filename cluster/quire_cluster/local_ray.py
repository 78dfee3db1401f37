"""A private Ray cluster on this machine, and its end without a trace."""

import logging
import os
import shutil
import tempfile
import time
from pathlib import Path

import ray
from quire_engine.errors import InvalidParameter

log = logging.getLogger(__name__)
_REMOVAL_PATIENCE = 5.0  # seconds
_OBJECT_STORE_BYTES = 80 << 20  # no tensor and no token passes through Ray


class PrivateCluster:
    """Ray in a temporary folder of its own. `stop()` ends every process of it and removes the folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def stop(self) -> None:
        """Idempotent. Ray's processes may write their last lines while the folder goes, so it is tried again."""
        if ray.is_initialized():
            ray.shutdown()
        until = time.monotonic() + _REMOVAL_PATIENCE
        while self._folder.exists():
            shutil.rmtree(self._folder, ignore_errors=True)
            if time.monotonic() > until:
                log.warning("%s could not be removed", self._folder)
                return
            time.sleep(0.05)


def start_private_cluster(*, num_workers: int) -> PrivateCluster:
    """Starts Ray for this process with room for `num_workers` worker actors, on the GPUs that torch finds. Takes 3 to
    8 s."""
    import torch

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # it listens on this host only, for this process's actors
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # nothing here runs as a task
    os.environ.setdefault("RAY_worker_niceness", "0")  # a worker is the system, not a batch job beside it
    logging.getLogger("ray._private.worker").setLevel(logging.ERROR)  # it warns of signal handlers, which are ours
    folder = Path(tempfile.mkdtemp(prefix="quire-"))
    try:
        ray.init(
            address="local",
            _node_ip_address="127.0.0.1",
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            num_cpus=max(len(os.sched_getaffinity(0)), num_workers + 1),
            num_gpus=torch.cuda.device_count(),
            log_to_driver=True,
            logging_level=logging.ERROR,
            configure_logging=False,
            _temp_dir=str(folder),
        )
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return PrivateCluster(folder)


def workers_on_gpus(device: str, workers: int, *, may_grow: bool = False) -> bool:
    """Whether each of `workers` workers gets a GPU of the running Ray cluster, for an engine on `device`.

    Raises InvalidParameter where there are too few; for a cluster that `may_grow`, says that they are waited for.
    """
    gpus = int(ray.cluster_resources().get("GPU", 0)) if device != "cpu" else 0
    if device == "cuda" and not gpus:
        raise InvalidParameter("device is 'cuda', but the Ray cluster has no GPU", "device")
    if 0 < gpus < workers:
        few = f"{workers} workers (-tp times -pp, for each replica) take a GPU each, and the Ray cluster has {gpus}"
        if not may_grow:
            raise InvalidParameter(f"{few}: use fewer, or --device cpu", "tensor_parallel_size")
        log.warning("%s; replicas wait for more to join", few)
    return gpus > 0
