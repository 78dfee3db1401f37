"""`quire load-balancer`: the configuration of one, for the gateways that are registered."""

import logging
import os
import shlex
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from quire_cluster.addresses import host_of
from quire_cluster.load_balancer import GatewayAddress, Listens, Trust, configuration
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
        told = _made(kind, control, config)
        _tell(told, config)
        while watch:
            time.sleep(_LOOK)
            try:
                now = _made(kind, control, config)
                if now != told:
                    _tell(now, config)
                    told = now
            except QuireError as error:  # the load balancer goes on with those it knows
                log.warning("the load balancer is not told of today's gateways; it is tried again: %s", error)


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
    return configuration(kind, gateways, listens, _trust(found, config))


def _trust(gateways: Sequence[pb.GatewayStatus], config: LoadBalancerConfig) -> Trust | None:
    """None for gateways without TLS. Raises InvalidParameter where the options do not go with the gateways."""
    if not any(one.tls for one in gateways):
        if config.ssl_ca_certs is None and config.ssl_server_name is None:
            return None
        raise InvalidParameter(
            "the gateways have no certificates: leave out --ssl-ca-certs and --ssl-server-name, or start the cluster "
            "with --ssl-certfile and --ssl-keyfile",
            "ssl_ca_certs",
        )
    if config.ssl_ca_certs is None or config.ssl_server_name is None:
        raise InvalidParameter(
            "the gateways speak TLS: give --ssl-ca-certs FILE with the CA of their certificates, and "
            "--ssl-server-name NAME that these are for",
            "ssl_ca_certs" if config.ssl_ca_certs is None else "ssl_server_name",
        )
    return Trust(ca=config.ssl_ca_certs, name=config.ssl_server_name)


def _tell(text: str, config: LoadBalancerConfig) -> None:
    """In place of what was there, whole or not at all; then the load balancer is told. Raises QuireError."""
    if config.output is None:
        say(text, end="")
        return
    path = Path(config.output)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_text(text)
        fresh.replace(path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise InvalidParameter(f"--output {path} cannot be written: {error.strerror}", "output") from error
    if config.reload is None:
        return
    try:
        done = subprocess.run(shlex.split(config.reload), capture_output=True, text=True, check=False)
    except (OSError, ValueError) as error:  # there is no such program; a quotation does not end
        raise InvalidParameter(f"--reload {config.reload} cannot be run: {error}", "reload") from error
    if done.returncode:
        why = (done.stderr or done.stdout).strip() or f"it ended with {done.returncode}"
        raise ServerError(f"{path} is written, but {config.reload} failed: {why}")
