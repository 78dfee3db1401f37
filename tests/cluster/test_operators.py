"""What operators ask of a cluster that governs is on its audit log."""

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from quire_cluster.access import prepare_access
from quire_cluster.admin import AdminConfig, AdminServer
from quire_cluster.config import GatewayConfig
from quire_cluster.deployment import Deployment
from quire_cluster.governance.chain import AuditLog
from quire_cluster.governance.config import Governance
from quire_cluster.governance.database import Database
from quire_engine.errors import InvalidParameter
from quire_protos.v1 import control_pb2 as pb
from quire_protos.v1 import control_pb2_grpc
from ray_head import free_ports

KEY = "the admin's"


class Controller:
    """In place of one: it does nothing, and knows no deployment."""

    async def deploy(self, wanted: Sequence[Deployment]) -> dict[str, str]:
        return {one.name: "created" for one in wanted}

    async def scale(self, name: str, replicas: int | None) -> None:
        raise InvalidParameter(f"no deployment {name!r}", "name")

    async def status(self) -> pb.StatusResponse:
        return pb.StatusResponse()


@asynccontextmanager
async def operated(folder: Path) -> AsyncIterator[tuple[AdminConfig, AdminServer]]:
    (folder / "governance.yaml").write_text("")
    governance = await prepare_access(GatewayConfig(governance=str(folder / "governance.yaml")), {})
    assert isinstance(governance, Governance)
    port, grpc_port = free_ports(2)
    config = AdminConfig(host="127.0.0.1", port=port, grpc_port=grpc_port, key=KEY, governance=governance)
    made: Any = Controller()
    server = AdminServer(made, config)
    await server.start()
    yield config, server
    await server._grpc.stop(None)  # a controller's ends with its process
    server._http.should_exit = True
    assert server._http_task is not None
    await server._http_task


async def read(config: AdminConfig) -> list[dict[str, Any]]:
    """The oldest first."""
    governance = config.governance
    assert governance is not None
    database = Database(governance.database)
    audit = AuditLog(database, governance.signing_key)
    assert (await audit.verify()).fault is None
    found = [entry.values for entry in await audit.list(limit=1000)]
    await database.close()
    return found[::-1]


def test_what_operators_ask_is_on_record(tmp_path: Path) -> None:
    """Over HTTP and gRPC, of what changes something: before it is done, so that what fails is there, too."""

    async def run() -> None:
        async with operated(tmp_path) as (config, server):
            key = {"authorization": f"Bearer {KEY}"}
            root = f"http://127.0.0.1:{config.port}/quire.v1.Control"
            spec = {
                "name": "tiny",
                "options": {"model": "none", "max_num_seqs": 8},
                "chat_template": "a secret way to say",
            }
            async with httpx.AsyncClient(trust_env=False) as client:
                done = await client.post(f"{root}/Deploy", json={"deployments": [spec]}, headers=key)
                assert done.json() == {"done": {"tiny": "created"}}, done.text
                await client.post(f"{root}/Status", json={}, headers=key)
                refused = await client.post(f"{root}/Deploy", json={"deployments": [spec]})
                assert refused.status_code == 401
            async with grpc.aio.insecure_channel(
                f"127.0.0.1:{config.grpc_port}", [("grpc.enable_http_proxy", 0)]
            ) as channel:
                stub: Any = control_pb2_grpc.ControlStub(channel)
                with pytest.raises(grpc.RpcError, match="no deployment"):
                    await stub.Scale(pb.ScaleRequest(name="other", replicas=3), metadata=tuple(key.items()))
            await server.close_records()
            deployed, scaled = await read(config)
            assert (deployed["kind"], deployed["key"], deployed["tenant"]) == ("admin", "operator", "")
            assert (deployed["action"], deployed["address"]) == ("cluster.deploy", "127.0.0.1")
            [asked] = deployed["asked"]["deployments"]
            assert asked["options"] == spec["options"]
            assert asked["chat_template"].startswith("sha256:"), "it may be long, and is known by its digest"
            assert (scaled["action"], scaled["asked"]) == ("cluster.scale", {"name": "other", "replicas": 3})

    asyncio.run(run())


def test_nothing_is_done_that_cannot_be_put_on_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with operated(tmp_path) as (config, server):
            write = os.write

            def full(descriptor: int, data: bytes) -> int:
                if b"cluster.deploy" in bytes(data):
                    raise OSError(28, "No space left on device")
                return write(descriptor, data)

            monkeypatch.setattr(os, "write", full)
            async with httpx.AsyncClient(trust_env=False, headers={"authorization": f"Bearer {KEY}"}) as client:
                body = {"deployments": [{"name": "tiny", "options": {"model": "none"}}]}
                url = f"http://127.0.0.1:{config.port}/quire.v1.Control/Deploy"
                refused = await client.post(url, json=body)
                assert refused.status_code == 503, refused.text
                monkeypatch.undo()
                assert (await client.post(url, json=body)).status_code == 200
            await server.close_records()
            assert [one["action"] for one in await read(config)] == ["cluster.deploy", "cluster.deploy"]

    asyncio.run(run())
