"""What listens, and what those get who have no key: every socket of a running server is tried."""

import ipaddress
import socket
from typing import Any

import grpc
import httpx
import psutil
import pytest
from conftest import RunningServer, processes, wait_until
from quire_protos.v1 import engine_pb2, engine_pb2_grpc

NEITHER = "no name and no answer: it hangs up on what is not its own protocol"
KINDS = {
    "quire": "HTTP and gRPC for clients, and the driver's port for its actors",
    "gcs_server": "Ray's store",
    "raylet": "Ray's node manager and object manager",
    "ray::RuntimeEnvAgent": "Ray's agent",
    "ray::Controller": "an actor's port",
    "ray::Replica": "an actor's port, and the sessions",
    "ray::Worker": "an actor's port; the rendezvous and gloo of several ranks, which cannot ask who connects",
    "monitor.py": "Ray's autoscaler: numbers for Prometheus, at a port of its own",
}


def kind_of(process: psutil.Process) -> str:
    command = process.cmdline()
    if any(part.endswith("monitor.py") for part in command):
        return "monitor.py"
    if "quire_cluster.cli.main" in command or any("quire" in part for part in command[1:4]):
        return "quire"
    return command[0].split(".")[0] if command[0].startswith("ray::") else process.name()


def listeners(server: RunningServer) -> list[tuple[str, str, int]]:
    """Kind of process, address and port of each listening socket of a server and of all below it."""
    root = psutil.Process(server.process.pid)
    found = []
    for process in [root, *root.children(recursive=True)]:
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                found.append((kind_of(process), connection.laddr.ip, connection.laddr.port))
    return found


def test_nothing_listens_beyond_this_host(two_replicas: RunningServer) -> None:
    found = listeners(two_replicas)
    print(found)
    assert {kind for kind, _, _ in found} <= KINDS.keys()
    for kind, address, port in found:
        ip = ipaddress.ip_address(address)
        inner = getattr(ip, "ipv4_mapped", None) or ip
        assert inner.is_loopback, (kind, address, port)
