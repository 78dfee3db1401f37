"""A private Ray cluster on this machine, and its end without a trace."""

import logging
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from quire_engine.errors import InvalidParameter, Unavailable
from ray import _raylet
from ray._private import ray_constants
from ray._private import worker as ray_worker

log = logging.getLogger(__name__)
_REMOVAL_PATIENCE = 5.0  # seconds
_OBJECT_STORE_BYTES = 80 << 20  # no tensor and no token passes through Ray
_LAST_LINES = 5  # of a log


_TOKEN_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


class PrivateCluster:
    """Ray in a temporary folder of its own, which it shares with its token and nobody else. `stop()` ends every process
    of it and removes the folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._given: dict[str, str | None] = {name: os.environ.get(name) for name in _TOKEN_VARIABLES}
        token = folder / "token"
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
        _authenticate({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": None, "RAY_AUTH_TOKEN_PATH": str(token)})

    @property
    def is_whole(self) -> bool:
        """Whether the processes without which Ray does nothing are there."""
        node = ray_worker._global_node
        needed = {ray_constants.PROCESS_TYPE_RAYLET, ray_constants.PROCESS_TYPE_GCS_SERVER}
        return node is not None and not needed & {kind for kind, _ in node.dead_processes()}

    def stop(self) -> None:
        """Idempotent. Ray's processes may write their last lines while the folder goes, so it is tried again."""
        if ray.is_initialized():
            ray.shutdown()
        _authenticate(self._given)
        self._given = {}
        until = time.monotonic() + _REMOVAL_PATIENCE
        while self._folder.exists():
            shutil.rmtree(self._folder, ignore_errors=True)
            if time.monotonic() > until:
                log.warning("%s could not be removed", self._folder)
                return
            time.sleep(0.05)


def _authenticate(variables: Mapping[str, str | None]) -> None:
    """Sets or unsets Ray's environment variables for the processes to come, and has this one read them again."""
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    core: Any = _raylet
    core.Config.initialize("")  # the mode before the token: in the old mode, a thread that still talks could miss it
    core.AuthenticationTokenLoader.instance().reset_cache()


def start_private_cluster(*, num_workers: int, namespace: str | None = None) -> PrivateCluster:
    """Starts Ray for this process with room for `num_workers` worker actors, on the GPUs that torch finds. Takes 3 to
    8 s. It listens on the loopback address alone, and answers to who has the token in its folder.

    Raises Unavailable where Ray does not start, and logs what its processes said last.
    """
    import torch

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # nothing here runs as a task
    os.environ.setdefault("RAY_worker_niceness", "0")  # a worker is the system, not a batch job beside it
    logging.getLogger("ray._private.worker").setLevel(logging.ERROR)  # it warns of signal handlers, which are ours
    try:
        folder = Path(tempfile.mkdtemp(prefix="quire-"))
    except OSError as error:
        raise Unavailable(f"Ray needs a folder for its sockets and logs ($TMPDIR, or /tmp): {error}") from error
    cluster = PrivateCluster(folder)
    # Ray replaces a loopback address by the host's own, and then its processes listen on all addresses. This is its
    # switch for desktops, which it reads from the environment only when it is imported.
    reachable, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        ray.init(
            address="local",
            namespace=namespace,
            _node_ip_address="127.0.0.1",
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            num_cpus=max(len(os.sched_getaffinity(0)), num_workers + 1),
            num_gpus=torch.cuda.device_count(),
            log_to_driver=True,
            logging_level=logging.ERROR,
            configure_logging=False,
            _temp_dir=str(folder / "ray"),  # which it opens to all users
        )
    except Exception as error:
        said = _last_words(folder)
        cluster.stop()
        log.error("Ray did not start%s", f"; its processes said last:\n{said}" if said else "")
        raise Unavailable(f"Ray could not be started in {folder}: {error}") from error
    except BaseException:
        cluster.stop()
        raise
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = reachable
    return cluster


def _last_words(folder: Path) -> str:
    """Of the processes without which Ray does nothing, from their logs, without the tables of counts there."""
    said = []
    for name in ("gcs_server.out", "gcs_server.err", "raylet.out", "raylet.err"):
        path = folder / "ray" / "session_latest" / "logs" / name
        if path.is_file():
            lines = [
                line for line in path.read_text(errors="replace").splitlines() if line and line[0] != "\t"
            ]  # counts
            said += [f"  {name}: {line}" for line in lines[-_LAST_LINES:]]
    return "\n".join(said)


def join_cluster(address: str, namespace: str) -> None:
    """Makes this process one of a running Ray cluster's. Raises Unavailable."""
    try:
        host, _, port = address.rpartition(":")
        if host and port.isdigit() and "://" not in host:  # Ray itself tries for minutes
            socket.create_connection((host, int(port)), timeout=5).close()
        ray.init(address=address, namespace=namespace, logging_level=logging.WARNING, log_to_driver=True)
    except (OSError, ValueError, OverflowError, RuntimeError) as error:
        raise Unavailable(f"no Ray cluster answers at {address}: {error}") from error


def workers_on_gpus(device: str, workers: int, *, may_grow: bool = False) -> bool:
    """Whether each of `workers` workers gets a GPU of the running Ray cluster, for an engine on `device`.

    Raises InvalidParameter where there are too few. In a cluster that `may_grow`, replicas wait for more to join; what
    an autoscaler could add is not known here, so that without any GPU yet only device cuda waits for one.
    """
    gpus = int(ray.cluster_resources().get("GPU", 0)) if device != "cpu" else 0
    if device != "cuda" and not gpus:
        return False
    if gpus < workers:
        few = f"{workers} workers (-tp times -pp, for each replica) take a GPU each, and the Ray cluster has {gpus}"
        if may_grow:
            log.warning("%s; replicas wait for more to join", few)
        elif gpus:
            raise InvalidParameter(f"{few}: use fewer, or --device cpu", "tensor_parallel_size")
        else:
            raise InvalidParameter("device is 'cuda', but the Ray cluster has no GPU", "device")
    return True
