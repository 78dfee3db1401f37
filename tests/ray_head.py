"""A Ray cluster of one node, in which tests start Quire as operators do."""

import os
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conftest import processes, wait_until
from web import LIMIT


def free_ports(count: int) -> list[int]:
    taken = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in taken]
    for one in taken:
        one.close()
    return ports


class Head:
    """A Ray cluster of one node, and where its operator keeps the key."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.ray_port, self.http, self.grpc, self.admin, self.admin_grpc, clients = free_ports(6)
        self.file = home / "admin.json"
        self.token = secrets.token_hex(32)
        (home / "token").write_text(self.token)
        self.environment = os.environ | {
            "QUIRE_HOME": str(home),
            "COLUMNS": "200",
            "TRITON_INTERPRET": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(home / "token"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "1",
        }
        self._said = folder / "said"
        options = (
            f"--head --block --num-cpus 4 --object-store-memory 80000000 --node-ip-address 127.0.0.1 "
            f"--port {self.ray_port} --ray-client-server-port {clients} "  # servers of two heads would share one port
            f"--include-dashboard false --temp-dir {folder}"
        )
        ray = str(Path(sys.executable).with_name("ray"))
        with self._said.open("wb") as output:
            command = [ray, "start", *options.split()]
            self.process = subprocess.Popen(command, env=self.environment, stdout=output, stderr=output)
        wait_until(lambda: "Ray runtime started" in self._said.read_text() or self.process.poll() is not None)
        assert self.process.poll() is None, self._said.read_text()

    def quire(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "quire.cli.main", *arguments]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=LIMIT, check=False)

    def start(self, **options: object) -> subprocess.CompletedProcess[str]:
        given: dict[str, object] = {
            "port": self.http,
            "grpc-port": self.grpc,
            "admin-port": self.admin,
            "admin-grpc-port": self.admin_grpc,
        }
        given |= {name.replace("_", "-"): value for name, value in options.items()}
        said = [f"--{name}={value}" for name, value in given.items()]
        return self.quire("start", "--ray-address", f"127.0.0.1:{self.ray_port}", *said)

    def pids(self, *kinds: str) -> list[int]:
        return [pid for kind in kinds for pid in processes(self.process.pid, kind)]


@contextmanager
def ray_head(home: Path) -> Iterator[Head]:
    """One, until the end. `home`: Quire's."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # pytest's own path is too long for a socket
        made = Head(Path(folder), home)
        try:
            yield made
        finally:
            made.process.terminate()
            made.process.wait(120)
