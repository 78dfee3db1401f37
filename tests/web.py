"""HTTP as tests speak it: a machine may be slow, so only what never happens runs into the limit."""

import socket

import httpx

LIMIT = 300.0  # seconds
http = httpx.Client(timeout=LIMIT, limits=httpx.Limits(max_connections=None, max_keepalive_connections=0))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
