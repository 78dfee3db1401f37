"""The nodes of the Ray cluster: where they are, what they have, and which of them are leaving."""

import asyncio
import logging
import time
from typing import Any

import ray
from quire_engine.errors import InvalidParameter
from ray._private import worker as ray_worker
from ray.core.generated import autoscaler_pb2

from quire_cluster.local_ray import workers_on_gpus

log = logging.getLogger(__name__)
_REFRESH = 1.0  # seconds between looks
_HEAD = "node:__internal_head__"


def is_head(node: dict[str, Any]) -> bool:
    """By Ray's own words of it."""
    return _HEAD in node["Resources"]


class Nodes:
    """As of the last look. All that asks Ray does so off the event loop."""

    def __init__(self) -> None:
        self._nodes: dict[str, dict[str, Any]] = {}
        self._looked = 0.0
        self.leaving: frozenset[str] = frozenset()  # drained by an operator, or about to be taken away

    async def refresh(self) -> None:
        """Looks."""

        def work() -> tuple[list[dict[str, Any]], frozenset[str]]:
            gcs: Any = ray_worker.global_worker.gcs_client
            return ray.nodes(), frozenset(gcs.get_draining_nodes())

        nodes, self.leaving = await asyncio.to_thread(work)
        self._nodes = {node["NodeID"]: node for node in nodes if node["Alive"]}
        self._looked = time.monotonic()

    async def refresh_now_and_then(self) -> None:
        """Where the last look is old; a failure is told, and what was seen stays."""
        if time.monotonic() - self._looked >= _REFRESH:
            try:
                await self.refresh()
            except Exception:  # Ray's, of any kind: its head may be away for a while
                self._looked = time.monotonic()
                log.exception("Ray does not tell of its nodes; it is asked again")

    @property
    def alive(self) -> list[dict[str, Any]]:
        """Ray's own words of each."""
        return list(self._nodes.values())

    @property
    def identities(self) -> list[str]:
        """Of those that are there."""
        return list(self._nodes)

    @property
    def head(self) -> str:
        """Where the controller is."""
        return next(identity for identity, node in self._nodes.items() if is_head(node))

    @property
    def least_cores(self) -> int:
        """Of the smallest node that has any."""
        return min((int(c) for node in self.alive if (c := node["Resources"].get("CPU", 0)) >= 1), default=1)

    async def address(self, node: str) -> str | None:
        """As other nodes see it; None: it is gone. One that has joined since the last look is looked for."""
        if node not in self._nodes:
            await self.refresh()
        found = self._nodes.get(node)
        return str(found["NodeManagerAddress"]) if found is not None else None

    def workers_on_gpus(self, device: str, workers: int, *, may_grow: bool) -> bool:
        """Whether each worker gets a GPU (see `local_ray.workers_on_gpus`)."""
        return workers_on_gpus(device, workers, may_grow=may_grow)

    async def drain(self, node: str) -> None:
        """Has Ray place nothing there any more, and the node leave once nothing runs there. Idempotent. Raises
        InvalidParameter for a node that is not there, and for the head."""
        await self.refresh()
        found = [
            identity
            for identity, one in self._nodes.items()
            if identity.startswith(node) or node in (one["NodeManagerAddress"], one["NodeManagerHostname"])
        ]
        if len(found) != 1:
            known = ", ".join(f"{one['NodeID'][:8]} ({one['NodeManagerAddress']})" for one in self.alive)
            which = "no node is" if not found else f"{len(found)} nodes are"
            raise InvalidParameter(f"{which} called {node!r:.100}; there are: {known}", "node")
        if is_head(self._nodes[found[0]]):
            raise InvalidParameter("the head cannot be drained: the controller is there; use `quire shutdown`", "node")
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        gcs: Any = ray_worker.global_worker.gcs_client
        accepted, why = await asyncio.to_thread(gcs.drain_node, found[0], reason, "drained by an operator", 0)
        if not accepted:
            raise InvalidParameter(f"Ray does not drain this node: {why}", "node")
        await self.refresh()
