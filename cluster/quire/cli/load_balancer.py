"""`quire load-balancer`: the configuration of one, for the gateways that are registered."""

import logging
import os
import shlex
import subprocess
import time
from pathlib import Path

from quire_cluster.addresses import host_of
from quire_cluster.load_balancer import GatewayAddress, Listens, configuration
from quire_engine.errors import InvalidParameter, QuireError, ServerError
from quire_protos.v1 import control_pb2 as pb

from quire.cli.config import LoadBalancerConfig
from quire.cli.operate import Control
from quire.cli.terminal import say

log = logging.getLogger(__name__)
_LOOK = 2.0  # seconds between looks at what is registered


def load_balancer(kind: str, config: LoadBalancerConfig, *, watch: bool) -> None:
    """Writes it, once or whenever gateways come and go."""
    if watch and config.output is None:
        raise InvalidParameter("--watch writes a file: name it with --output", "output")
    with Control(config) as control:
        written = _write(_made(kind, control, config), config)
        while watch:
            time.sleep(_LOOK)
            try:
                now = _made(kind, control, config)
            except QuireError as error:  # the load balancer goes on with those it knows
                log.warning("the cluster does not tell of its gateways; it is asked again: %s", error)
                continue
            if now != written:
                written = _write(now, config)


def _made(kind: str, control: Control, config: LoadBalancerConfig) -> str:
    found = control.call("Status", pb.StatusRequest()).gateways
    if not found:
        raise ServerError("no gateway is registered yet; try again once `quire status` shows one")
    gateways = [
        GatewayAddress(
            name=one.id.replace(":", "-"),
            host=host_of(one.http),
            http_port=int(one.http.rpartition(":")[2]),
            grpc_port=int(one.grpc.rpartition(":")[2]),
        )
        for one in found
    ]
    socket = f"{Path(config.output).resolve()}.sock" if config.output is not None else "/run/haproxy-quire.sock"
    listens = Listens(
        host=config.listen_host, port=config.listen_port, grpc_port=config.listen_grpc_port, socket=socket
    )
    return configuration(kind, gateways, listens)


def _write(text: str, config: LoadBalancerConfig) -> str:
    """In place of what was there, whole or not at all; then the load balancer is told."""
    if config.output is None:
        say(text, end="")
        return text
    path = Path(config.output)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_text(text)
        fresh.replace(path)
    except OSError as error:
        raise InvalidParameter(f"--output {path} cannot be written: {error.strerror}", "output") from error
    if config.reload is not None:
        done = subprocess.run(shlex.split(config.reload), capture_output=True, text=True, check=False)
        if done.returncode:
            log.error("%s failed: %s", config.reload, (done.stderr or done.stdout).strip())
    return text
