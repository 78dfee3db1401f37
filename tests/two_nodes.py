"""A Ray cluster of two nodes on this machine, with Quire started in it, for operators' commands."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
from ray.cluster_utils import Cluster
from web import free_port

NODE = {"num_cpus": 4, "object_store_memory": 80 << 20}


class TwoNodes:
    """`start` makes it; commands find it as an operator's do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        home = folder / "home"
        os.environ.update(
            {
                "QUIRE_HOME": str(home),
                "RAY_AUTH_MODE": "disabled",
                "RAY_USAGE_STATS_ENABLED": "0",
                "RAY_worker_niceness": "0",
                "RAY_health_check_period_ms": "500",
                "RAY_health_check_failure_threshold": "4",
            }
        )
        self.ray = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
        self.nodes = [self.ray.add_node(**NODE)]
        self.environment = os.environ | {"RAY_ADDRESS": self.ray.address, "COLUMNS": "200"}
        self.admin, self._admin_grpc = free_port(), free_port()
        self._home = str(home)

    def start(self, *options: str) -> None:
        """With gateways on any port."""
        self.run(
            *("start", "--ray-address", "auto", "--port", "0", "--grpc-port", "0", *options),
            *("--admin-port", str(self.admin), "--admin-grpc-port", str(self._admin_grpc)),
        )
        key = json.loads(Path(self._home, "admin.json").read_text())["key"]
        self._calls = httpx.Client(
            base_url=f"http://127.0.0.1:{self.admin}/quire.v1.Control",
            headers={"authorization": f"Bearer {key}"},
            timeout=30,
        )

    def run(self, *arguments: str) -> str:
        """A command's output. It has to succeed."""
        done = subprocess.run(
            [sys.executable, "-m", "quire.cli.main", *arguments],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert not done.returncode, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    def status(self) -> dict[str, Any]:
        """What `quire status --json` prints. Raises httpx.HTTPError while no controller is there."""
        answer = self._calls.post("/Status", json={})
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found

    def has_state(self) -> bool:
        """Whether a controller answers, and knows its replicas."""
        try:
            return all(one["replicas"] for one in self.status()["deployments"])
        except httpx.HTTPError:
            return False

    def deployment(self, name: str) -> dict[str, Any]:
        found: dict[str, Any]
        [found] = [one for one in self.status()["deployments"] if one["name"] == name]
        return found

    def replicas(self, name: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.deployment(name)["replicas"]
        return found

    def serving(self, name: str, count: int) -> Callable[[], bool]:
        """Whether it has so many replicas, and nothing goes on with others."""
        return lambda: [one["phase"] for one in self.replicas(name)] == ["serving"] * count

    def actors(self, kind: str) -> list[int]:
        """Processes of the cluster's actors."""
        return sorted(
            process.pid
            for process in psutil.process_iter(["cmdline"])
            if (process.info["cmdline"] or [""])[0].startswith(f"ray::{kind}") and self._is_ours(process)
        )

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get("QUIRE_HOME") == self._home
        except psutil.Error:
            return False

    def close(self) -> None:
        self._calls.close()
        self.ray.shutdown()
