"""Configurations of load balancers in front of a cluster's gateways, made from those that are registered."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import jinja2
from quire_engine.errors import InvalidParameter

from quire_cluster.addresses import with_port

KINDS = {"haproxy": "haproxy.cfg.j2", "nginx": "nginx.conf.j2", "envoy": "envoy.yaml.j2"}
_PATIENCE = 3600  # seconds that an answer may take, and that one may pause
_BUFFER = 256 << 10  # bytes; about 60,000 tokens of English
_RETRIES = 3
_STREAMS = 1024  # calls of one gRPC connection, as at a gateway
_ERRORS = {
    502: "the gateway ended before it answered; try again",
    503: "no gateway is ready; try again",
    504: "the gateway did not answer in time",
}


@dataclass(frozen=True, kw_only=True)
class GatewayAddress:
    """Where one is reached."""

    name: str
    host: str
    http_port: int
    grpc_port: int

    @property
    def http(self) -> str:
        """host:port"""
        return with_port(self.host, self.http_port)

    @property
    def grpc(self) -> str:
        """host:port"""
        return with_port(self.host, self.grpc_port)


@dataclass(frozen=True, kw_only=True)
class Listens:
    """Where clients reach the load balancer. `socket`: of HAProxy's own commands."""

    host: str
    port: int
    grpc_port: int
    socket: str


@dataclass(frozen=True, kw_only=True)
class Trust:
    """How gateways with TLS are known."""

    ca: str  # a PEM file with the CAs of their certificates, where the load balancer runs
    name: str  # that all of these are for

    def __post_init__(self) -> None:
        """Raises InvalidParameter for what would not be one word in a configuration."""
        if not re.fullmatch(r"[\w./+@~:,=-]+", self.ca):
            raise InvalidParameter(f"ssl_ca_certs is {self.ca!r:.80}; give a path without blanks or quotes")
        if not re.fullmatch(r"[A-Za-z0-9.-]+", self.name):
            raise InvalidParameter(f"ssl_server_name is {self.name!r:.80}; give a DNS name, as models.example.org")


def configuration(kind: str, gateways: Sequence[GatewayAddress], listens: Listens, trust: Trust | None = None) -> str:
    """For one of KINDS. Gateways that share an address (the ports of one host) are one to it. `trust`: None: they have
    no TLS."""
    loader = jinja2.PackageLoader("quire_cluster", "load_balancers")
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    apart: dict[tuple[str, str], GatewayAddress] = {}
    for gateway in sorted(gateways, key=lambda one: one.name):
        apart.setdefault((gateway.http, gateway.grpc), gateway)
    return environment.get_template(KINDS[kind]).render(
        gateways=list(apart.values()),
        host="[::]" if listens.host == "::" else listens.host,
        address=listens.host,
        port=listens.port,
        grpc_port=listens.grpc_port,
        socket=listens.socket,
        trust=trust,
        patience=_PATIENCE,
        buffer=_BUFFER,
        retries=_RETRIES,
        streams=_STREAMS,
        errors={status: _error_body(what) for status, what in _ERRORS.items()},
    )


def _error_body(what: str) -> str:
    """OpenAI's shape, as gateways answer."""
    return json.dumps({"error": {"message": what, "type": "server_error", "param": None, "code": None}})
