"""What a controller has to know after its death: kept in Ray's own store, on the head."""

import asyncio
import json
from dataclasses import asdict, dataclass

from ray.experimental import internal_kv

from quire_cluster.deployment import Deployment
from quire_cluster.slot import Needs


@dataclass(frozen=True, kw_only=True)
class Record:
    """Of one deployment. `epoch`: the highest that a replica of it had. `pinned`: replicas that an operator asked for,
    in place of what the load does."""

    deployment: Deployment
    needs: Needs
    epoch: int = 0
    pinned: int | None = None
    max_model_len: int = 0  # of the replica that loaded last; before that, what the model allows
    load_seconds: float = 0.0  # that the last one took


class Store:
    """Records by the deployment's name, of one cluster. Every call is one of Ray's, off the event loop; changes are
    made one after another, so that the last word is what stays."""

    def __init__(self, cluster: str) -> None:
        self._prefix = f"quire:{cluster}:"
        self._changing = asyncio.Lock()

    async def read_all(self) -> list[Record]:
        """In the order of their names."""

        def work() -> list[Record]:
            found = []
            for key in sorted(internal_kv._internal_kv_list(self._prefix + "deployment:")):
                values = json.loads(internal_kv._internal_kv_get(key))
                values["deployment"] = Deployment.from_json(values["deployment"])
                values["needs"] = Needs(**values["needs"])
                found.append(Record(**values))
            return found

        return await asyncio.to_thread(work)

    async def write(self, record: Record) -> None:
        """In place of what was kept of this deployment."""
        values = asdict(record) | {"deployment": record.deployment.to_json()}
        await self._put(f"deployment:{record.deployment.name}", json.dumps(values))

    async def delete(self, name: str) -> None:
        """Of a deployment that is no more."""
        async with self._changing:
            await asyncio.to_thread(internal_kv._internal_kv_del, f"{self._prefix}deployment:{name}")

    async def get(self, name: str) -> str | None:
        """A text of the cluster's own (its secret), or None."""
        value = await asyncio.to_thread(internal_kv._internal_kv_get, f"{self._prefix}cluster:{name}")
        return None if value is None else value.decode()

    async def put(self, name: str, text: str) -> None:
        """Keeps one."""
        await self._put(f"cluster:{name}", text)

    async def clear(self) -> None:
        """Forgets the cluster."""
        async with self._changing:
            await asyncio.to_thread(internal_kv._internal_kv_del, self._prefix, del_by_prefix=True)

    async def _put(self, key: str, text: str) -> None:
        async with self._changing:
            await asyncio.to_thread(internal_kv._internal_kv_put, self._prefix + key, text, overwrite=True)
