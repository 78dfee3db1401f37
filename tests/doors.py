"""Who gets in: every socket of processes is tried without a key."""

import ipaddress
from collections.abc import Collection

import grpc
import psutil
from conftest import listeners
from web import http

METHODS = [
    "ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "ray.rpc.InternalKVGcsService/InternalKVGet",
    "ray.rpc.NodeManagerService/GetNodeStats",
    "ray.rpc.ObjectManagerService/Pull",
    "ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "ray.rpc.RayletDriver/ClusterInfo",  # the port for Ray clients of a head that `ray start` made
    "quire.v1.Engine/Session",
    "quire.v1.Inference/ListModels",
    "quire.v1.Control/Status",
]
CODE = grpc.StatusCode
# Which answer who has no key, and why that does no harm.
OPEN = {
    "monitor.py": "numbers for Prometheus, which cannot be turned off",
}


def call(port: int, method: str, token: str | None = None, host: str = "127.0.0.1") -> grpc.StatusCode:
    """What a call with an empty message gets."""
    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(f"{host}:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            if method.endswith("Session"):
                next(channel.stream_stream(f"/{method}")(iter([b""]), timeout=60, metadata=metadata))
            else:
                channel.unary_unary(f"/{method}")(b"", timeout=60, metadata=metadata)
        except grpc.RpcError as error:
            return error.code()
    return CODE.OK


def guarded_kinds(
    root: psutil.Process, token: str, *, open_ports: Collection[int] = (), beyond: bool = False
) -> tuple[set[str], set[tuple[str, int]]]:
    """The kinds of processes that listen, and those with a port that speaks gRPC and refuses. Fails for one that lets
    in who has no key, but for `open_ports`; or that listens beyond this host, unless they may."""
    seen, inside = set(), set()
    for kind, address, port in listeners(root):
        seen.add(kind)
        ip = ipaddress.ip_address(address.removeprefix("::ffff:"))
        assert ip.is_loopback or beyond, (kind, address, port)
        if port in open_ports:
            continue
        host = "127.0.0.1" if ip.is_unspecified else str(ip)
        refused = {method: call(port, method, host=host) for method in METHODS}
        assert CODE.OK not in refused.values(), (kind, port, refused)
        with_token = {call(port, method, token, host) for method in METHODS}
        if CODE.UNAUTHENTICATED in refused.values():
            inside.add((kind, port))
            continue  # it speaks gRPC
        assert with_token == {CODE.UNAVAILABLE}, (kind, port, with_token)
        if kind in OPEN:
            continue
        for path in ("/", "/get_or_create_runtime_env", "/v1/models", "/metrics", "/quire.v1.Control/Status"):
            assert http.post(f"http://{host}:{port}{path}", content=b"").status_code == 401, (kind, port, path)
    return seen, inside
