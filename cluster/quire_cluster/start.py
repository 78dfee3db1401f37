"""`quire start`: a controller and gateways in a running Ray cluster, which stay when this process ends."""

import asyncio
import json
import logging
import os
import secrets
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import ray
from quire_engine.errors import InvalidParameter, Unavailable

from quire_cluster.access import prepare_access
from quire_cluster.addresses import is_loopback, with_port
from quire_cluster.admin import AdminConfig
from quire_cluster.config import GatewayConfig, StartConfig
from quire_cluster.controller import ClusterConfig, Controller, actor_options
from quire_cluster.gateways import GatewayPlan
from quire_cluster.governance.config import Governance
from quire_cluster.liveness import LivenessProbe, named_controller, while_alive
from quire_cluster.local_ray import join_cluster
from quire_cluster.nodes import Nodes
from quire_cluster.workers import root_cause

log = logging.getLogger(__name__)
NAMESPACE = "quire"


@dataclass(frozen=True, kw_only=True)
class Operator:
    """What an operator's commands need: where to call, and the key. Kept in a file that only its owner reads."""

    address: str  # of the Control service over gRPC
    key: str

    def write(self, path: Path) -> None:
        """In place of what was there, whole or not at all."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump({"address": self.address, "key": self.key}, file)
        fresh.replace(path)


def start(config: StartConfig, file: Path) -> bool:
    """Starts what is not there, and returns when all of it answers: whether anything was started. Writes `file` for
    operators' commands. Raises QuireError, and then leaves nothing behind that it has started."""
    access = asyncio.run(prepare_access(config, os.environ))
    if isinstance(access, Governance) and access.embedded and config.gateways_on == "all":
        raise InvalidParameter(
            "gateways on several nodes cannot share SQLite's file; give a PostgreSQL server as `database` in "
            f"{config.governance}, or --gateways-on head",
            "governance",
        )
    join_cluster(config.ray_address, NAMESPACE)
    try:
        gateways = GatewayPlan(
            config=GatewayConfig(**{f.name: getattr(config, f.name) for f in fields(GatewayConfig)}),
            access=access,
            per_node=config.gateways,
            everywhere=config.gateways_on == "all",
        )
        # The keys are known by their digests alone from here on.
        alone = replace(absolute(gateways.config), api_key=None, api_key_file=None, governance=None)
        gateways = replace(gateways, config=alone)
        admin = AdminConfig(
            host=config.admin_host,
            port=config.admin_port,
            grpc_port=config.admin_grpc_port,
            key=secrets.token_urlsafe(32),
            governance=access if isinstance(access, Governance) else None,
        )
        return asyncio.run(_start(ClusterConfig(name=NAMESPACE, gateways=gateways, admin=admin), file))
    finally:
        ray.shutdown()


def absolute(config: GatewayConfig) -> GatewayConfig:
    """With the paths of certificates as they are meant here: gateways run in folders of Ray's own."""
    return replace(
        config,
        ssl_certfile=_absolute(config.ssl_certfile),
        ssl_keyfile=_absolute(config.ssl_keyfile),
        ssl_ca_certs=_absolute(config.ssl_ca_certs),
    )


def _absolute(path: str | None) -> str | None:
    return str(Path(path).absolute()) if path is not None else None


async def _start(config: ClusterConfig, file: Path) -> bool:
    admin = config.admin
    assert admin is not None, "a cluster that stays has operators"
    nodes = Nodes()
    await nodes.refresh()
    if is_loopback(admin.host) and ray.get_runtime_context().get_node_id() != nodes.head:
        raise InvalidParameter(
            f"operators' calls would be answered on {admin.host} of the head alone, and this is another node; start "
            "the cluster on its head, or give --admin-host",
            "admin_host",
        )
    try:
        controller = named_controller(NAMESPACE)
        fresh = False
    except ValueError:
        options = actor_options(NAMESPACE) | {"lifetime": "detached"}
        controller = ray.remote(Controller).options(**options).remote(config)
        fresh = True
    try:
        there: ClusterConfig = await while_alive(
            controller.ready.remote(), LivenessProbe(controller, "the controller", placed=False)
        )
    except Exception as error:
        if fresh:
            await _take_down(controller)
        raise root_cause(error) from error
    assert there.admin is not None, "it was started by this command"
    _check_alike(config, there)
    host = "127.0.0.1" if there.admin.host in ("0.0.0.0", "::") else there.admin.host
    Operator(address=with_port(host, there.admin.grpc_port), key=there.admin.key).write(file)
    return fresh


async def _take_down(controller: Any) -> None:
    try:
        await asyncio.wait_for(controller.shutdown.remote(0.0), 15)
    except Exception as error:
        log.warning("what had been started did not stop by itself: %s", root_cause(error))
    ray.kill(controller)


def _check_alike(asked: ClusterConfig, there: ClusterConfig) -> None:
    """Raises Unavailable where the cluster that runs was started with other options."""
    assert asked.admin is not None and there.admin is not None, "both have operators"
    if replace(asked, admin=replace(asked.admin, key=there.admin.key)) != there:
        raise Unavailable(
            "a cluster runs here already, with other options; `quire shutdown` ends it, and `quire start` with the "
            "same options as then changes nothing"
        )
