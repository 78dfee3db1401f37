"""Ray's processes begin with a fork of one in which gRPC may be at work."""

import asyncio
import subprocess
import threading
from collections.abc import Iterator

import grpc
import pytest


@pytest.fixture
def busy_grpc() -> Iterator[None]:
    """Calls over a loopback connection, all the time, in a thread."""
    over = threading.Event()

    async def answer(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        return request

    class Echo(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            return grpc.unary_unary_rpc_method_handler(answer)

    async def call() -> None:
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        server.add_generic_rpc_handlers((Echo(),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            while not over.is_set():
                assert await channel.unary_unary("/echo/Echo")(b"x") == b"x"
        await server.stop(0)

    thread = threading.Thread(target=asyncio.run, args=(call(),))
    thread.start()
    yield
    over.set()
    thread.join()


def test_grpc_keeps_out_of_forks(busy_grpc: None, capfd: pytest.CaptureFixture[str]) -> None:
    """Where it minds them, it says for most that it was too busy to."""
    for _ in range(50):
        assert subprocess.run(["true"], preexec_fn=lambda: None).returncode == 0
    assert "fork" not in capfd.readouterr().err
