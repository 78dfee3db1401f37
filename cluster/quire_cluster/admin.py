"""Operators' calls: the Control service over gRPC, and the same over HTTP as JSON (POST /quire.v1.Control/Method, as
the Connect protocol has unary calls). Both want the cluster's admin key."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc
import orjson
from google.protobuf import json_format
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from quire_engine.errors import InvalidParameter, QuireError
from quire_protos.v1 import control_pb2 as pb
from quire_protos.v1 import control_pb2_grpc
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from quire_cluster.addresses import with_port
from quire_cluster.deployment import Deployment, make_deployment
from quire_cluster.gateway import reflection
from quire_cluster.gateway.calls import CallGuard
from quire_cluster.gateway.connection import HttpConfig, HttpServer, Limits
from quire_cluster.gateway.doors import Doors
from quire_cluster.gateway.grpc_api import status_code
from quire_cluster.gateway.http import error_body, error_response, json_response
from quire_cluster.gateway.process import bind
from quire_cluster.governance.identity import CallerCheck, SharedKeys
from quire_cluster.keys import Keys

log = logging.getLogger(__name__)
SERVICE = pb.DESCRIPTOR.services_by_name["Control"]
PARAMETER = "quire-parameter"  # trailing metadata: what was wrong, as deployment.option
_REFUSAL = "missing or wrong admin key; `quire start` has written it where only its owner reads"
_LARGEST = 4 << 20  # bytes of a call
_LIMITS = Limits(connections=64, head=20.0, body=20.0, write=60.0)
_CHANGING = ("Deploy", "Delete", "Scale", "Drain", "Shutdown")


@dataclass(frozen=True, kw_only=True)
class AdminConfig:
    """Where operators call, and with which key."""

    host: str
    port: int  # of HTTP
    grpc_port: int
    key: str = field(repr=False)


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


class _Refusing(grpc.aio.ServerInterceptor):
    """Errors of ours become gRPC's; what changes something is logged."""

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = await continuation(details)
        method = details.method.rpartition("/")[2]
        if handler is None or not details.method.startswith(f"/{SERVICE.full_name}/"):
            return handler

        async def answer(request: Any, context: Any) -> Any:
            try:
                _note(method, request)
                return await handler.unary_unary(request, context)
            except json_format.Error as error:  # a number that JSON does not have
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"this is no {method}Request: {error}")
            except QuireError as error:
                if isinstance(error, InvalidParameter) and error.parameter:
                    context.set_trailing_metadata(((PARAMETER, error.parameter.encode("ascii", "replace").decode()),))
                await context.abort(status_code(error), str(error))

        return grpc.unary_unary_rpc_method_handler(answer, handler.request_deserializer, handler.response_serializer)


def _note(method: str, request: Any) -> None:
    if method in _CHANGING:
        log.info("%s: %s", method, json_format.MessageToJson(request, indent=None))


class AdminServer:
    """Both servers."""

    def __init__(self, controller: Operations, config: AdminConfig) -> None:
        self._config = config
        self._service = ControlService(controller)
        identity = SharedKeys(Keys([config.key]), _REFUSAL)
        doors = CallerCheck(identity, open_services=[health.SERVICE_NAME])
        self._grpc = grpc.aio.server(
            interceptors=[doors, CallGuard(_LIMITS.body), _Refusing()],
            options=[
                ("grpc.max_receive_message_length", _LARGEST),
                ("grpc.so_reuseport", 0),
                ("grpc.max_allowed_incoming_connections", _LIMITS.connections),
            ],
        )
        control_pb2_grpc.add_ControlServicer_to_server(self._service, self._grpc)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        reflection.enable((SERVICE.full_name, health.SERVICE_NAME), self._grpc)
        routes = [
            Route(f"/{SERVICE.full_name}/{{method}}", self._call, methods=["POST"]),
            Route("/health", self._ok, methods=["GET"]),
        ]
        app = Doors.of(config.host, identity, (), ()).before(Starlette(routes=routes))
        self._http = HttpServer(HttpConfig(app, _LIMITS))
        self._http_task: asyncio.Task[None] | None = None

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

    async def _ok(self, request: Request) -> Response:
        return json_response({"status": "ok"})

    async def _call(self, request: Request) -> Response:
        """JSON in, JSON out, by the same methods."""
        name = request.path_params["method"]
        method = SERVICE.methods_by_name.get(name)
        if method is None:
            known = ", ".join(SERVICE.methods_by_name)
            return json_response(
                error_body(InvalidParameter(f"there is no method {name:.80}; there are: {known}"), 404), 404
            )
        message = getattr(pb, method.input_type.name)()
        call: Callable[[Any, Any], Any] = getattr(self._service, name)
        try:
            body = await request.body()
            if len(body) > _LARGEST:
                raise InvalidParameter(f"the body has more than {_LARGEST} bytes")
            json_format.Parse(body or b"{}", message)
            _note(name, message)
            answer = await call(message, None)
        except (json_format.Error, UnicodeDecodeError) as error:
            return error_response(InvalidParameter(f"the body is no {method.input_type.name}: {error}"))
        except QuireError as error:
            return error_response(error)
        except Exception:  # a bug of ours: the caller gets its 500, and the log the cause
            log.exception("%s failed", name)
            return json_response(error_body(QuireError("internal error; it is in the controller's log"), 500), 500)
        content = json_format.MessageToDict(
            answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        return Response(orjson.dumps(content), media_type="application/json")
