"""Operators' calls: the Control service over gRPC, and the same over HTTP as JSON (POST /quire.v1.Control/Method, as
the Connect protocol has unary calls). Both want the cluster's admin key."""

import asyncio
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc
from google.protobuf import json_format
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from quire_engine.errors import InvalidParameter
from quire_protos.v1 import control_pb2 as pb
from quire_protos.v1 import control_pb2_grpc
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from quire_cluster.addresses import with_port
from quire_cluster.deployment import Deployment, make_deployment
from quire_cluster.gateway import reflection
from quire_cluster.gateway.call_errors import CallErrors
from quire_cluster.gateway.calls import CallGuard
from quire_cluster.gateway.connection import HttpConfig, HttpServer, Limits
from quire_cluster.gateway.doors import Doors
from quire_cluster.gateway.http import json_response
from quire_cluster.gateway.json_calls import LARGEST, JsonCalls
from quire_cluster.gateway.process import bind
from quire_cluster.governance.config import Governance
from quire_cluster.governance.identity import CallerCheck, SharedKeys
from quire_cluster.governance.operators import OperatorLog
from quire_cluster.keys import Keys

log = logging.getLogger(__name__)
SERVICE = pb.DESCRIPTOR.services_by_name["Control"]
_REFUSAL = "missing or wrong admin key; `quire start` has written it where only its owner reads"
_LIMITS = Limits(connections=64, head=20.0, body=20.0, write=60.0)
_CHANGING = ("Deploy", "Delete", "Scale", "Drain", "Shutdown")


@dataclass(frozen=True, kw_only=True)
class AdminConfig:
    """Where operators call, and with which key."""

    host: str
    port: int  # of HTTP
    grpc_port: int
    key: str = field(repr=False)
    governance: Governance | None = field(default=None, repr=False)  # whose audit log has what they do


def deployment_of(spec: pb.DeploymentSpec) -> Deployment:
    """Of a message. Raises InvalidParameter, whose parameter is deployment.option."""
    options = json_format.MessageToDict(spec.options)
    return make_deployment(spec.name, options, spec.chat_template if spec.HasField("chat_template") else None)


class Operations(Protocol):
    """What operators may ask of a controller. Each raises QuireError."""

    async def deploy(self, wanted: Sequence[Deployment]) -> dict[str, str]:
        """All of them, or none."""

    async def delete(self, name: str) -> None:
        """Ends a deployment."""

    async def scale(self, name: str, replicas: int | None) -> None:
        """None: by load."""

    async def drain_replica(self, name: str, index: int) -> None:
        """Another one takes its place."""

    async def drain_node(self, node: str) -> None:
        """It leaves."""

    async def status(self) -> pb.StatusResponse:
        """Of everything."""

    async def why(self, request_id: str) -> pb.WhyResponse:
        """Of one request, or of all that wait."""

    async def shutdown(self, drain_seconds: float | None) -> None:
        """Ends everything but itself."""

    def end_soon(self) -> None:
        """Ends itself."""


class ControlService(control_pb2_grpc.ControlServicer):
    """The calls, over a controller."""

    def __init__(self, controller: Operations) -> None:
        self._controller = controller

    async def Deploy(self, request: pb.DeployRequest, context: Any) -> pb.DeployResponse:
        """All of them, or none."""
        names = [spec.name for spec in request.deployments]
        if twice := {name for name in names if names.count(name) > 1}:
            raise InvalidParameter(f"{min(twice)} is there twice", f"{min(twice)}.name")
        wanted = [deployment_of(spec) for spec in request.deployments]
        return pb.DeployResponse(done=await self._controller.deploy(wanted))

    async def Delete(self, request: pb.DeleteRequest, context: Any) -> pb.DeleteResponse:
        """By its name."""
        await self._controller.delete(request.name)
        return pb.DeleteResponse()

    async def Scale(self, request: pb.ScaleRequest, context: Any) -> pb.ScaleResponse:
        """To a number, or by load."""
        await self._controller.scale(request.name, request.replicas if request.HasField("replicas") else None)
        return pb.ScaleResponse()

    async def Drain(self, request: pb.DrainRequest, context: Any) -> pb.DrainResponse:
        """A replica or a node."""
        if request.WhichOneof("what") == "replica":
            await self._controller.drain_replica(request.replica.deployment, request.replica.slot)
        elif request.node:
            await self._controller.drain_node(request.node)
        else:
            raise InvalidParameter("name a replica (with its deployment and slot) or a node", "node")
        return pb.DrainResponse()

    async def Status(self, request: pb.StatusRequest, context: Any) -> pb.StatusResponse:
        """Of the whole cluster."""
        return await self._controller.status()

    async def Why(self, request: pb.WhyRequest, context: Any) -> pb.WhyResponse:
        """Of one request, or of all that wait."""
        return await self._controller.why(request.request_id)

    async def Shutdown(self, request: pb.ShutdownRequest, context: Any) -> pb.ShutdownResponse:
        """Answers once everything but the controller is gone."""
        await self._controller.shutdown(request.drain_seconds if request.HasField("drain_seconds") else None)
        self._controller.end_soon()
        return pb.ShutdownResponse()


def _shown(request: Any) -> dict[str, Any]:
    """As it is logged: templates by their digests."""
    shown: dict[str, Any] = json_format.MessageToDict(request, preserving_proto_field_name=True)
    for spec in shown.get("deployments", ()):
        if "chat_template" in spec:
            spec["chat_template"] = "sha256:" + hashlib.sha256(spec["chat_template"].encode()).hexdigest()
    return shown


class AdminServer:
    """Both servers."""

    def __init__(self, controller: Operations, config: AdminConfig) -> None:
        self._config = config
        self._service = ControlService(controller)
        self._on_record = OperatorLog(config.governance) if config.governance is not None else None
        identity = SharedKeys(Keys([config.key]), _REFUSAL)
        doors = CallerCheck(identity, open_services=[health.SERVICE_NAME])
        self._grpc = grpc.aio.server(
            interceptors=[doors, CallGuard(_LIMITS.body), CallErrors(SERVICE, self._note)],
            options=[
                ("grpc.max_receive_message_length", LARGEST),
                ("grpc.so_reuseport", 0),
                ("grpc.max_allowed_incoming_connections", _LIMITS.connections),
            ],
        )
        control_pb2_grpc.add_ControlServicer_to_server(self._service, self._grpc)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        reflection.enable((SERVICE.full_name, health.SERVICE_NAME), self._grpc)
        routes = [
            *JsonCalls(SERVICE, self._service, on_call=self._note).routes(),
            Route("/health", self._ok, methods=["GET"]),
        ]
        app = Doors.of(config.host, identity, (), ()).before(Starlette(routes=routes))
        self._http = HttpServer(HttpConfig(app, _LIMITS))
        self._http_task: asyncio.Task[None] | None = None
        self._recording: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Raises InvalidParameter where a port is taken."""
        config = self._config
        listener = bind(config.host, config.port, "admin-port")
        self._http_task = asyncio.ensure_future(self._http.serve(sockets=[listener]))
        try:
            self._grpc.add_insecure_port(with_port(config.host, config.grpc_port))
        except RuntimeError as error:  # it says no more than that
            address = with_port(config.host, config.grpc_port)
            raise InvalidParameter(
                f"cannot listen on {address}; choose another with --admin-grpc-port", "admin_grpc_port"
            ) from error
        await self._grpc.start()
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        if self._on_record is not None:
            self._recording = asyncio.ensure_future(self._on_record.run())

    async def close_records(self) -> None:
        """What operators have done is on the audit log, which takes no more."""
        if self._on_record is not None and self._recording is not None:
            self._recording.cancel()
            await self._on_record.close()
            self._recording = None

    def _note(self, method: str, request: Any) -> None:
        if method in _CHANGING:
            shown = _shown(request)
            log.info("%s: %s", method, json.dumps(shown))
            if self._on_record is not None:
                self._on_record.note(f"cluster.{method.lower()}", shown)

    async def _ok(self, request: Request) -> Response:
        return json_response({"status": "ok"})
