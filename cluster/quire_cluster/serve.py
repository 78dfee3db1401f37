"""`quire serve`: a Ray cluster (private or joined), its controller, and a gateway in this process."""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import time
import uuid
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import ray
from quire_engine import allocator
from quire_engine.config import EngineConfig
from quire_engine.errors import EngineFailure, InvalidParameter, ModelError, ServerError, Unavailable
from quire_engine.models.check import check_model
from quire_engine.weights.resolve import ModelFiles

from quire_cluster.addresses import with_port
from quire_cluster.config import ServeConfig, entries
from quire_cluster.controller import Controller
from quire_cluster.gateway.connection import BACKLOG, HttpConfig, HttpServer, Limits, raise_open_files
from quire_cluster.gateway.doors import Doors
from quire_cluster.gateway.grpc_api import GrpcServer
from quire_cluster.gateway.http import Api
from quire_cluster.gateway.service import Service
from quire_cluster.keys import read_keys
from quire_cluster.liveness import LivenessProbe, while_alive
from quire_cluster.local_ray import PrivateCluster, start_private_cluster, workers_on_gpus
from quire_cluster.routing_table import Key, RoutingTable

log = logging.getLogger(__name__)
_WATCH_RETRY, _LONGEST_WATCH_RETRY = 0.5, 30.0  # seconds
_READINESS = 0.1  # seconds between looks at it
_CLUSTER = 0.5  # the same, at the private cluster's processes


def bind(host: str, port: int, what: str) -> socket.socket:
    """A listening socket. Raises InvalidParameter when the port is taken, naming the option that changes it. One that
    does not listen yet would not keep another server, which still loads its model, from the same port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
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


class Server:
    """The whole system of one `quire serve`. `run` returns when it has been asked to stop and everything is gone."""

    def __init__(self, engine: EngineConfig, serve: ServeConfig, files: ModelFiles) -> None:
        self._engine = engine
        self._serve = serve
        self._files = files
        self._name = f"quire-{uuid.uuid4().hex[:12]}"
        self._cluster: PrivateCluster | None = None
        self._controller: Any = None
        self._liveness: LivenessProbe  # of the controller
        self._stop = asyncio.Event()
        self._hurry = False  # what runs at the end is not waited for
        self._failure: ServerError | None = None
        self.http_port = 0
        self.grpc_port = 0

    async def run(self, on_ready: Callable[["Server"], None] = lambda server: None) -> None:
        """Serves until `stop`. Raises ServerError when the model cannot be served."""
        loop = asyncio.get_running_loop()
        self._catch_signals()
        config = self._serve
        keys = read_keys(config.api_key, config.api_key_file, os.environ)
        doors = Doors.of(config.host, keys, entries(config.allowed_hosts), entries(config.allowed_origins))
        connections = raise_open_files(config.max_connections)
        if connections < config.max_connections:
            log.warning("the system's limit on open files leaves room for %d connections; see ulimit -n", connections)
        limits = Limits(connections, config.header_timeout, config.body_timeout, config.write_timeout)
        listener = bind(self._serve.host, self._serve.port, "port")
        bind(self._serve.host, self._serve.grpc_port, "grpc-port").close()
        watchers: list[asyncio.Task[None]] = []
        service: Service | None = None
        http: HttpServer | None = None
        http_task: asyncio.Task[None] | None = None
        grpc_server: GrpcServer | None = None
        try:
            cluster = loop.run_in_executor(None, self._start_cluster)
            loading = loop.run_in_executor(None, self._load_service)
            # Where one fails the other is awaited: a cluster that is still to come could not be stopped.
            await asyncio.wait((cluster, loading))
            for failed in (cluster.exception(), loading.exception()):
                if failed is not None:
                    raise failed
            service = loading.result()
            allocator.return_freed_memory()
            gc.freeze()  # modules and tokenizer stay; a collection that goes through them holds the loop up
            self._catch_signals()  # Ray has put its own handlers in front
            await self._start_controller()
            http = HttpServer(HttpConfig(doors.before(Api(service).app()), limits))
            http_task = self._begin(http.serve(sockets=[listener]), "the HTTP server")
            self.http_port = listener.getsockname()[1]
            grpc_server = GrpcServer(service, limits, keys=keys)
            self.grpc_port = await grpc_server.start(self._serve.host, self._serve.grpc_port)
            service.dispatcher.on_silence = self._report_silence
            watchers += [
                self._begin(grpc_server.wait(), "the gRPC server"),
                self._begin(self._watch(service), "following the controller"),
                self._begin(self._watch_cluster(service), "watching the private Ray cluster"),
                self._begin(self._tell_readiness(service, grpc_server), "telling the gRPC health service"),
            ]
            await self._until_ready(service)
            if not self._stop.is_set():
                await grpc_server.set_serving(True)  # before anyone hears that it is ready
                on_ready(self)
            await self._stop.wait()
            if self._failure is not None:
                raise self._failure
        finally:
            await self._shut_down(service, http, http_task, grpc_server, watchers)
            listener.close()

    @property
    def model_names(self) -> list[str]:
        """What clients may call the model."""
        return (self._serve.served_model_name or self._files.name).split(",")

    def stop(self) -> None:
        """Drain and end. Idempotent."""
        self._stop.set()

    def _interrupted(self) -> None:
        """The first signal lets running requests finish; the second does not."""
        self._hurry = self._stop.is_set()
        self.stop()

    def _catch_signals(self) -> None:
        """SIGHUP, a terminal that closes, is no less an end than the others; `nohup` has it ignored."""
        loop = asyncio.get_running_loop()
        ends = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            ends.append(signal.SIGHUP)
        for number in ends:
            loop.remove_signal_handler(number)
            loop.add_signal_handler(number, self._interrupted)

    def _begin(self, part: Coroutine[Any, Any, None], name: str) -> "asyncio.Task[None]":
        """A part that lasts as long as the server: where it ends by itself, the server does, and says why."""

        def ended(task: "asyncio.Task[None]") -> None:
            if task.cancelled():
                return
            error = task.exception()
            if error is not None:
                log.error("%s failed", name, exc_info=error)
            if not self._stop.is_set():
                why = f": {type(error).__name__}: {error}" if error is not None else ""
                self._failure = ServerError(f"{name} ended by itself{why}; start the server again")
                self.stop()

        task = asyncio.ensure_future(part)
        task.add_done_callback(ended)
        return task

    async def _until_ready(self, service: Service) -> None:
        while not service.ready and not self._stop.is_set():
            await asyncio.sleep(0.02)

    # ---- start ----------------------------------------------------------------------------------------------------

    def _load_service(self) -> Service:
        template = None
        if self._serve.chat_template:
            try:
                template = Path(self._serve.chat_template).read_text("utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise InvalidParameter(f"--chat-template cannot be read: {error}", "chat_template") from error
        return Service.load(self._files, self._engine, names=self.model_names, chat_template=template)

    def _start_cluster(self) -> None:
        workers = self._engine.num_workers * self._serve.data_parallel_size
        if self._serve.ray_address is None:
            self._cluster = start_private_cluster(num_workers=workers)
            return
        try:
            host, _, port = self._serve.ray_address.rpartition(":")
            if host and port.isdigit() and "://" not in host:  # Ray itself tries for minutes
                socket.create_connection((host, int(port)), timeout=5).close()
            ray.init(address=self._serve.ray_address, logging_level=logging.WARNING, log_to_driver=True)
        except (OSError, ValueError, OverflowError, RuntimeError) as error:
            raise Unavailable(f"no Ray cluster answers at {self._serve.ray_address}: {error}") from error

    async def _start_controller(self) -> None:
        if self._controller is not None:  # lost from sight, but perhaps alive: two would take each other's places
            ray.kill(self._controller)
        config, serve = self._engine, self._serve
        total = config.num_workers * serve.data_parallel_size
        on_gpu = workers_on_gpus(config.device, total, may_grow=self._cluster is None)
        threads = config.cpu_threads or max(1, len(os.sched_getaffinity(0)) // total)
        host = "127.0.0.1" if self._cluster is not None else None
        self._controller = (
            ray.remote(Controller)
            .options(num_cpus=0, max_concurrency=64)
            .remote(self._name, config, serve.data_parallel_size, threads=threads, gpu=on_gpu, host=host)
        )
        self._liveness = LivenessProbe(self._controller, "the controller")
        await while_alive(self._controller.start.remote(), self._liveness)

    async def _watch(self, service: Service) -> None:
        """Follows the routing table. Whatever fails is logged and tried again, while requests go where they last could;
        a controller that died or fell silent is started again, its replicas with it."""
        version, pause, dead = 0, _WATCH_RETRY, False
        while not self._stop.is_set():
            try:
                if dead:
                    await self._start_controller()
                    version, dead = 0, False
                table: RoutingTable = await while_alive(self._controller.watch.remote(version), self._liveness)
                self._follow(table, service)
                version, pause = table.version, _WATCH_RETRY
                continue
            except ray.exceptions.RayActorError:
                if not self._cluster_stands:
                    self._end_without_cluster(service)
                    return
                log.error("the controller died; it is started again")
                dead = True
            except EngineFailure as error:
                log.error("%s; it is started again", error)
                dead = True
            except Exception:  # whoever follows no more would serve by an old table for ever
                log.exception("following the controller failed; it is tried again")
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_WATCH_RETRY)

    @property
    def _cluster_stands(self) -> bool:
        return self._cluster is None or self._cluster.is_whole

    async def _watch_cluster(self, service: Service) -> None:
        """Without Ray nothing can be started again. What runs still finishes: replicas live on for a while, and only a
        minute after its head died would Ray end this process, without a word to anyone."""
        while self._cluster_stands:
            await asyncio.sleep(_CLUSTER)
        self._end_without_cluster(service)

    def _end_without_cluster(self, service: Service) -> None:
        self._give_up(service, "the private Ray cluster died; start the server again")

    def _follow(self, table: RoutingTable, service: Service) -> None:
        if table.failure is not None:
            self._give_up(service, table.failure)
            return
        service.dispatcher.update_table(table)
        if service.dispatcher.max_model_len:
            # An engine that pools has one place more, for the token that it does not generate.
            service.max_model_len = service.dispatcher.max_model_len - (service.pooling is not None)

    def _give_up(self, service: Service, why: str) -> None:
        """No replica will serve any more."""
        self._failure = ModelError(why)
        service.dispatcher.give_up(f"no replica could be started: {why}")
        self.stop()

    def _report_silence(self, key: Key) -> None:
        self._controller.suspect.remote(key)

    async def _tell_readiness(self, service: Service, grpc_server: GrpcServer) -> None:
        """Keeps gRPC's health service up to date."""
        told = False
        while True:
            if (ready := service.ready) != told:
                await grpc_server.set_serving(ready)
                told = ready
            await asyncio.sleep(_READINESS)

    # ---- end ------------------------------------------------------------------------------------------------------

    async def _shut_down(
        self,
        service: Service | None,
        http: HttpServer | None,
        http_task: "asyncio.Task[None] | None",
        grpc_server: GrpcServer | None,
        watchers: "list[asyncio.Task[None]]",
    ) -> None:
        """Refuse what is new, let what runs finish, then take everything down from the outside in."""
        if service is not None:
            service.draining = True
            until = time.monotonic() + self._serve.shutdown_timeout
            if grpc_server is not None:
                await grpc_server.set_serving(False)
            if service.num_open:
                log.info("draining: %d requests are running", service.num_open)
            while service.num_open and time.monotonic() < until and not self._hurry:
                await asyncio.sleep(0.02)
        if http is not None and http_task is not None:
            http.should_exit = True
            await asyncio.wait({http_task})
        if grpc_server is not None:
            await grpc_server.stop(1.0)
        for watcher in watchers:
            watcher.cancel()
        if service is not None:
            await service.dispatcher.close()
        if self._controller is not None and self._cluster_stands:
            try:
                await asyncio.wait_for(self._controller.shutdown.remote(), 15)
            except (TimeoutError, ray.exceptions.RayError) as error:
                log.warning("the controller did not stop by itself: %r", error)
            ray.kill(self._controller)
        if self._cluster is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._cluster.stop)
        elif ray.is_initialized():
            ray.shutdown()


def serve(engine: EngineConfig, config: ServeConfig, on_ready: Callable[[Server], None]) -> None:
    """Runs a server in the foreground. Raises QuireError with what was wrong and how to mend it."""
    files = check_model(engine)
    with contextlib.suppress(ImportError):
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    try:
        asyncio.run(Server(engine, config, files).run(on_ready))
    except ray.exceptions.RayError as error:
        raise ServerError(f"Ray failed: {error}") from error
