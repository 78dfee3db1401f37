"""Addresses and ports, of servers and of clients."""

import asyncio
import re
import socket

import pytest
from gateways import models_of
from quire_cluster.addresses import host_of, is_loopback, with_port
from quire_cluster.gateway.connection import Limits
from quire_cluster.gateway.grpc_api import GrpcServer
from quire_cluster.gateway.process import bind
from quire_cluster.gateway.service import Service
from quire_cluster.observability.metrics import Metrics
from quire_engine.config import DEMO_MODEL
from quire_engine.errors import InvalidParameter
from quire_engine.text.tokenizer import Tokenizer
from quire_engine.weights.resolve import resolve


@pytest.mark.parametrize(
    ("host", "written", "local"),
    [
        ("localhost", "localhost:80", True),
        ("127.0.0.1", "127.0.0.1:80", True),
        ("127.8.9.1", "127.8.9.1:80", True),
        ("::1", "[::1]:80", True),
        ("::", "[::]:80", False),
        ("0.0.0.0", "0.0.0.0:80", False),
        ("models.example", "models.example:80", False),
    ],
)
def test_hosts(host: str, written: str, local: bool) -> None:
    assert (with_port(host, 80), host_of(written), is_loopback(host)) == (written, host, local)


def test_a_port_is_taken_from_the_start() -> None:
    """Two servers that load their models at the same time: the second is told before it loads anything."""
    with bind("127.0.0.1", 0, "port") as listener:
        port = listener.getsockname()[1]
        with pytest.raises(InvalidParameter, match=rf"cannot listen on 127.0.0.1:{port} .*--grpc-port"):
            bind("127.0.0.1", port, "grpc-port")


def test_a_port_that_is_taken_meanwhile() -> None:
    """gRPC listens once the model is there."""
    files = resolve(DEMO_MODEL)
    service = Service(
        files, Tokenizer.load(files), names=["demo"], max_model_len=8192, max_waiting=16, metrics=Metrics()
    )

    async def run(port: int) -> None:
        server = GrpcServer(models_of(service), Limits(connections=16, head=60.0, body=60.0, write=60.0), identity=None)
        try:
            await server.start("127.0.0.1", port)
        finally:
            await server.stop(0)

    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = with_port(*taken.getsockname())
        with pytest.raises(
            InvalidParameter, match=re.escape(f"cannot listen on {address}; choose another with --grpc")
        ):
            asyncio.run(run(taken.getsockname()[1]))
