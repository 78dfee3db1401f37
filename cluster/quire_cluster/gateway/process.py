"""A gateway: its servers, and what it hears from the controller and tells it. It owns its streams and nothing else."""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Coroutine
from typing import Any

import ray
from quire_engine.errors import EngineFailure, InvalidParameter, ServerError
from quire_engine.multimodal.pictures import PictureLimits

from quire_cluster.addresses import with_port
from quire_cluster.config import GatewayConfig, entries
from quire_cluster.gateway.connection import BACKLOG, HttpConfig, HttpServer, Limits, raise_open_files
from quire_cluster.gateway.doors import Doors
from quire_cluster.gateway.governance_api import SERVICE as GOVERNANCE
from quire_cluster.gateway.governance_api import GovernanceService
from quire_cluster.gateway.grpc_api import GrpcServer
from quire_cluster.gateway.http import Api
from quire_cluster.gateway.json_calls import JsonCalls
from quire_cluster.gateway.judges import judge
from quire_cluster.gateway.media import Media
from quire_cluster.gateway.models import Models
from quire_cluster.gateway.secure import SecureHttpServer
from quire_cluster.gateway.tls import Tls
from quire_cluster.governance.config import Governance
from quire_cluster.governance.governor import Governor
from quire_cluster.governance.identity import Identity, SharedKeys
from quire_cluster.keys import Keys
from quire_cluster.liveness import LivenessProbe, while_alive
from quire_cluster.observability.governance import GovernanceCollector
from quire_cluster.observability.metrics import Metrics
from quire_cluster.reports import GatewayReport
from quire_cluster.routing_table import ClusterTable, Key

log = logging.getLogger(__name__)
_RETRY, _LONGEST_RETRY = 0.5, 30.0  # seconds until the controller is asked again
_READINESS = 0.1  # seconds between looks at it
_REPORT = 1.0  # seconds between reports


def bind(host: str, port: int, what: str, *, shared: bool = False) -> socket.socket:
    """A listening socket. Raises InvalidParameter when the port is taken, naming the option that changes it. One that
    does not listen yet would not keep another server, which still loads its model, from the same port. `shared`: with
    other gateways of this host."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except (OSError, UnicodeError) as error:  # a host's name that is too long is no UTF-8 to Python
        listener.close()
        why = error.strerror if isinstance(error, OSError) else error
        raise InvalidParameter(
            f"cannot listen on {with_port(host, port)} ({why}); choose another with --{what}", what
        ) from error
    return listener


class Gateway:
    """`open` binds, `start` answers; `failed` is set where a part of it ended by itself."""

    def __init__(
        self, config: GatewayConfig, access: Keys | Governance | None, *, name: str, shared_ports: bool = False
    ) -> None:
        """`access`: who may call; None: everybody. `name`: to the controller. `shared_ports`: other gateways of this
        host may listen on the same ones."""
        self._name = name
        self.http_port = 0
        self.grpc_port = 0
        self.failed: asyncio.Future[ServerError] = asyncio.get_running_loop().create_future()
        self._media = Media(config, PictureLimits())
        self._config = config
        self._governor = Governor(access, name, self._judge) if isinstance(access, Governance) else None
        self._identity: Identity | None = SharedKeys(access) if isinstance(access, Keys) else None
        if self._governor is not None:
            self._identity = self._governor.directory
        metrics = Metrics()
        if self._governor is not None:
            metrics.registry.register(GovernanceCollector(self._governor))
        self.models = Models(
            metrics, self._media, self._governor, on_silence=self._report_silence, on_wait=self._report_wait
        )
        self._shared = shared_ports
        self._doors = Doors.of(
            config.host, self._identity, entries(config.allowed_hosts), entries(config.allowed_origins)
        )
        connections = raise_open_files(config.max_connections)
        if connections < config.max_connections:
            log.warning("the system's limit on open files leaves room for %d connections; see ulimit -n", connections)
        self._limits = Limits(connections, config.header_timeout, config.body_timeout, config.write_timeout)
        self._tls: Tls | None = None
        self._listener: socket.socket | None = None
        self.api: Api
        self._http: HttpServer | None = None
        self._http_task: asyncio.Task[None] | None = None
        self._grpc: GrpcServer | None = None
        self._controller: Any = None
        self._parts: list[asyncio.Task[None]] = []
        self._asked: set[asyncio.Future[Any]] = set()
        self._stopping = False

    # ---- its beginning and its end --------------------------------------------------------------------------------

    def open(self) -> None:
        """Reads its certificate and takes its ports, or raises InvalidParameter."""
        config = self._config
        self._tls = Tls.of(config)
        self._listener = bind(config.host, config.port, "port", shared=self._shared)
        self.http_port = self._listener.getsockname()[1]
        bind(config.host, config.grpc_port, "grpc-port", shared=self._shared).close()

    async def start(self) -> None:
        """Answers from now on: with 503, until there is something to serve."""
        assert self._listener is not None, "start() before open()"
        if self._governor is not None:
            await self._governor.open()
            self._parts += [self._begin(part, name) for name, part in self._governor.parts().items()]
        governance = GovernanceService(self._governor) if self._governor is not None else None
        more = JsonCalls(GOVERNANCE, governance, may=governance.check).routes() if governance is not None else []
        self.api = Api(self.models, more)
        http = HttpConfig(self._doors.before(self.api.app()), self._limits)
        self._http = HttpServer(http) if self._tls is None else SecureHttpServer(http, self._tls)
        self._http_task = self._begin(self._http.serve(sockets=[self._listener]), "the HTTP server")
        self._grpc = GrpcServer(
            self.models,
            self._limits,
            identity=self._identity,
            governance=governance,
            shared_port=self._shared,
            tls=self._tls,
        )
        self.grpc_port = await self._grpc.start(self._config.host, self._config.grpc_port)
        self._parts += [
            self._begin(self._grpc.wait(), "the gRPC server"),
            self._begin(self._tell_readiness(self._grpc), "telling the gRPC health service"),
        ]
        if self._tls is not None:
            self._parts.append(self._begin(self._tls.follow(), "looking for a renewed certificate"))

    def follow(self, controller: Any, on_table: Callable[[ClusterTable], None] = lambda table: None) -> None:
        """Serves what the controller says is there, and reports to it. `on_table` is told of each table first."""
        self._controller = controller
        if self._governor is not None:
            self._governor.follow(controller)
        self._parts += [
            self._begin(self._watch(on_table), "following the controller"),
            self._begin(self._report(), "reporting to the controller"),
        ]

    def _begin(self, part: Coroutine[Any, Any, None], name: str) -> "asyncio.Task[None]":
        """A part that lasts as long as the gateway: half a gateway would be taken for a whole one."""

        def ended(task: "asyncio.Task[None]") -> None:
            if task.cancelled():
                return
            error = task.exception()
            if error is not None:
                log.error("%s failed", name, exc_info=error)
            if not self._stopping and not self.failed.done():
                why = f": {type(error).__name__}: {error}" if error is not None else ""
                self.failed.set_result(ServerError(f"{name} ended by itself{why}; start the server again"))

        task = asyncio.ensure_future(part)
        task.add_done_callback(ended)
        return task

    async def drain(self, seconds: float, hurry: Callable[[], bool] = lambda: False) -> None:
        """Refuses what is new, and lets what runs finish, for so long and until `hurry` says so."""
        models = self.models
        models.drain()
        self._stopping = True
        if self._grpc is not None:
            await self._grpc.set_serving(False)
        if models.num_open:
            log.info("draining: %d requests are running", models.num_open)
        until = time.monotonic() + seconds
        while models.num_open and time.monotonic() < until and not hurry():
            await asyncio.sleep(0.02)

    async def stop(self) -> None:
        """Takes everything down, from the outside in."""
        self._stopping = True
        if self._http is not None and self._http_task is not None:
            self._http.should_exit = True
            await asyncio.wait({self._http_task})
        if self._grpc is not None:
            await self._grpc.stop(1.0)
        for part in self._parts:
            part.cancel()
        await self.models.close()
        if self._governor is not None:
            await self._governor.close()
        await self._media.close()
        if self._listener is not None:
            self._listener.close()

    # ---- the controller -------------------------------------------------------------------------------------------

    async def _watch(self, on_table: Callable[[ClusterTable], None]) -> None:
        """Follows the table. Whatever fails is logged and tried again, while requests go where they last could. A
        controller that died is started again by Ray; one that fell silent is killed for that."""
        version, pause = 0, _RETRY
        probe = LivenessProbe(self._controller, "the controller")
        while True:
            try:
                table: ClusterTable = await while_alive(self._controller.watch.remote(version), probe)
                on_table(table)
                self.models.follow(table)
                version, pause = table.version, _RETRY
                continue
            except ray.exceptions.RayActorError:
                log.error("the controller died; Ray starts it again")
            except EngineFailure as error:
                log.error("%s; it is started again", error)
                ray.kill(self._controller, no_restart=False)
            except Exception:  # whoever follows no more would serve by an old table for ever
                log.exception("following the controller failed; it is tried again")
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_RETRY)
            probe = LivenessProbe(self._controller, "the controller")

    async def _report(self) -> None:
        node = ray.get_runtime_context().get_node_id()
        host = self._config.host
        reached = ray.util.get_node_ip_address() if host in ("0.0.0.0", "::") else host
        while True:
            self.models.look()
            report = GatewayReport(
                identity=self._name,
                node=node,
                pid=os.getpid(),
                host=reached,
                http_port=self.http_port,
                grpc_port=self.grpc_port,
                tls=self._tls is not None,
                ready=self.models.ready,
                open_requests=self.models.num_open,
                models=self.models.reports(),
            )
            self._tell(self._controller.report.remote(report))
            await asyncio.sleep(_REPORT)

    async def _judge(self, model: str, question: str) -> str:
        return await judge(self.models, model, question)

    def _report_silence(self, name: str, key: Key) -> None:
        self._tell(self._controller.suspect.remote(name, key))

    def _report_wait(self, name: str) -> None:
        self._tell(self._controller.wake.remote(name))

    def _tell(self, call: Any) -> None:
        """Something that the controller hears, or would hear again: its answer tells nothing."""
        told = asyncio.ensure_future(_quietly(call))
        self._asked.add(told)
        told.add_done_callback(self._asked.discard)

    async def _tell_readiness(self, grpc_server: GrpcServer) -> None:
        """Keeps gRPC's health service up to date."""
        told = False
        while True:
            if (ready := self.models.ready) != told:
                await grpc_server.set_serving(ready)
                told = ready
            await asyncio.sleep(_READINESS)


async def _quietly(call: Any) -> None:
    try:
        await call
    except ray.exceptions.RayError as error:
        log.debug("the controller was not told: %r", error)
