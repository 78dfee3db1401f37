"""`quire serve`: a Ray cluster (private or joined), its controller, and a gateway in this process, for one model."""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from quire_engine import allocator
from quire_engine.config import EngineConfig
from quire_engine.errors import InvalidParameter, ModelError, ServerError
from quire_engine.models.check import CheckedModel, check_model

from quire_cluster.access import prepare_access
from quire_cluster.config import ServeConfig
from quire_cluster.controller import ClusterConfig, Controller, actor_options
from quire_cluster.deployment import Deployment, DeploymentConfig
from quire_cluster.gateway.process import Gateway
from quire_cluster.gateway.service import Service
from quire_cluster.liveness import LivenessProbe, while_alive
from quire_cluster.local_ray import PrivateCluster, join_cluster, start_private_cluster
from quire_cluster.routing_table import ClusterTable, RoutingTable, Served

log = logging.getLogger(__name__)
_CLUSTER = 0.5  # seconds between looks at the private cluster's processes


class Server:
    """The whole system of one `quire serve`. `run` returns when it has been asked to stop and everything is gone."""

    def __init__(self, engine: EngineConfig, serve: ServeConfig, model: CheckedModel) -> None:
        self._serve = serve
        self._model = model
        self._name = f"quire-{uuid.uuid4().hex[:12]}"
        name, *aliases = self.model_names
        replicas = serve.data_parallel_size
        config = DeploymentConfig(
            aliases=",".join(aliases) or None,
            min_replicas=replicas,
            tool_call_parser=serve.tool_call_parser,
            reasoning_parser=serve.reasoning_parser,
            enable_auto_tool_choice=serve.enable_auto_tool_choice,
        )
        self._deployment = Deployment(name, engine, config, _chat_template(serve))
        self._cluster: PrivateCluster | None = None
        self._controller: Any = None
        self._stop = asyncio.Event()
        self._hurry = False  # what runs at the end is not waited for
        self._failure: ServerError | None = None
        self._gateway: Gateway

    @property
    def http_port(self) -> int:
        """That it got."""
        return self._gateway.http_port

    @property
    def grpc_port(self) -> int:
        """That it got."""
        return self._gateway.grpc_port

    async def run(self, on_ready: Callable[["Server"], None] = lambda server: None) -> None:
        """Serves until `stop`. Raises ServerError when the model cannot be served."""
        loop = asyncio.get_running_loop()
        self._catch_signals()
        config = self._serve
        gateway = self._gateway = Gateway(config, await prepare_access(config, os.environ), name="serve")
        gateway.failed.add_done_callback(lambda failed: self._give_up(failed.result()))
        gateway.open()
        watching: asyncio.Task[None] | None = None
        try:
            cluster = loop.run_in_executor(None, self._start_cluster)
            loading = loop.run_in_executor(None, gateway.models.read, self._deployment)
            # Where one fails the other is awaited: a cluster that is still to come could not be stopped.
            await asyncio.wait((cluster, loading))
            for failed in (cluster.exception(), loading.exception()):
                if failed is not None:
                    raise failed
            self._take(loading.result())
            allocator.return_freed_memory()
            gc.freeze()  # modules and tokenizer stay; a collection that goes through them holds the loop up
            self._catch_signals()  # Ray has put its own handlers in front
            await self._start_controller()
            await gateway.start()
            gateway.follow(self._controller, self._look_for_failure)
            watching = asyncio.ensure_future(self._watch_cluster())
            await self._until_ready()
            if not self._stop.is_set():
                on_ready(self)
            await self._stop.wait()
            if self._failure is not None:
                raise self._failure
        finally:
            if watching is not None:
                watching.cancel()
            await self._shut_down()

    @property
    def model_names(self) -> list[str]:
        """What clients may call the model."""
        return (self._serve.served_model_name or self._model.files.name).split(",")

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

    async def _until_ready(self) -> None:
        while not self._gateway.models.ready and not self._stop.is_set():
            await asyncio.sleep(0.02)

    # ---- start ----------------------------------------------------------------------------------------------------

    def _take(self, service: Service) -> None:
        """The gateway knows the model before the controller has told it."""
        table = RoutingTable(max_model_len=self._model.max_model_len)
        self._gateway.models.follow(ClusterTable(0, (Served(self._deployment, table),)), [service])

    def _start_cluster(self) -> None:
        workers = self._deployment.engine.num_workers * self._serve.data_parallel_size
        if self._serve.ray_address is None:
            self._cluster = start_private_cluster(num_workers=workers, namespace=self._name)
        else:
            join_cluster(self._serve.ray_address, self._name)

    async def _start_controller(self) -> None:
        private = self._cluster is not None
        config = ClusterConfig(name=self._name, host="127.0.0.1" if private else None, private=private)
        self._controller = ray.remote(Controller).options(**actor_options(self._name)).remote(config)
        contexts = {self._deployment.name: self._model.max_model_len}
        deployed = self._controller.deploy.remote([self._deployment], contexts=contexts)
        await while_alive(deployed, LivenessProbe(self._controller, "the controller"))

    @property
    def _cluster_stands(self) -> bool:
        return self._cluster is None or self._cluster.is_whole

    async def _watch_cluster(self) -> None:
        """Without Ray nothing can be started again. What runs still finishes: replicas live on for a while, and only a
        minute after its head died would Ray end this process, without a word to anyone."""
        while self._cluster_stands:
            await asyncio.sleep(_CLUSTER)
        self._give_up(ModelError("the private Ray cluster died; start the server again"))

    def _look_for_failure(self, table: ClusterTable) -> None:
        """Where no replica will serve any more, the server ends."""
        for served in table.deployments:
            if served.table.failure is not None:
                self._give_up(ModelError(served.table.failure))

    def _give_up(self, why: ServerError) -> None:
        self._failure = self._failure or why
        self.stop()

    # ---- end ------------------------------------------------------------------------------------------------------

    async def _shut_down(self) -> None:
        """Refuse what is new, let what runs finish, then take everything down from the outside in."""
        await self._gateway.drain(self._serve.shutdown_timeout, lambda: self._hurry)
        await self._gateway.stop()
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


def _chat_template(config: ServeConfig) -> str | None:
    if not config.chat_template:
        return None
    try:
        return Path(config.chat_template).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidParameter(f"--chat-template cannot be read: {error}", "chat_template") from error


def serve(engine: EngineConfig, config: ServeConfig, on_ready: Callable[[Server], None]) -> None:
    """Runs a server in the foreground. Raises QuireError with what was wrong and how to mend it."""
    model = check_model(engine)
    with contextlib.suppress(ImportError):
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    try:
        asyncio.run(Server(engine, config, model).run(on_ready))
    except ray.exceptions.RayError as error:
        raise ServerError(f"Ray failed: {error}") from error
