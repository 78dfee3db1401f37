"""How Ray's processes begin."""

import asyncio
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest
from conftest import wait_until
from quire_cluster.local_ray import start_private_cluster
from quire_engine.errors import Unavailable


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
    """Ray forks a process in which gRPC may be at work. Where gRPC minds that, it says of most that it was too busy."""
    for _ in range(50):
        assert subprocess.run(["true"], preexec_fn=lambda: None).returncode == 0
    assert "fork" not in capfd.readouterr().err


@pytest.mark.slow  # Ray waits for half a minute
def test_what_ray_said_last_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    def kill_the_raylet() -> None:
        wait_until(lambda: any(child.name() == "raylet" for child in psutil.Process().children()))
        for child in psutil.Process().children():
            if child.name() == "raylet":
                child.kill()

    killer = threading.Thread(target=kill_the_raylet)
    killer.start()
    with pytest.raises(Unavailable, match="timed out during startup") as raised:
        start_private_cluster(num_workers=1)
    killer.join()
    assert "raylet.out: " in caplog.text
    assert not Path(str(raised.value).split()[6].rstrip(":")).exists()
