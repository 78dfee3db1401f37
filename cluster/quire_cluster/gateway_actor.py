"""A gateway in a process of its own: the Ray actor that `quire start` puts on nodes."""

import asyncio
import logging

from quire_engine.errors import ServerError

from quire_cluster.config import GatewayConfig
from quire_cluster.gateway.process import Gateway
from quire_cluster.governance.config import Governance
from quire_cluster.keys import Keys
from quire_cluster.liveness import end_with_controller, named_controller
from quire_cluster.reports import WaitingRequest


class GatewayActor:
    """`run` returns when it was stopped, and raises what it failed with. It ends by itself once its controller is gone
    for good."""

    def __init__(self, name: str, namespace: str, config: GatewayConfig, access: Keys | Governance | None) -> None:
        """Takes its ports, which other gateways of its host may share, and answers. Ray calls it on the actor's event
        loop."""
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
        self._config = config
        self._gateway = Gateway(config, access, name=name, shared_ports=True)
        self._stopped = asyncio.Event()
        self._started = asyncio.ensure_future(self._start(namespace))
        self._orphaned = asyncio.ensure_future(end_with_controller(namespace))

    async def _start(self, namespace: str) -> None:
        self._gateway.open()
        await self._gateway.start()
        self._gateway.follow(await asyncio.to_thread(named_controller, namespace))

    async def ping(self) -> None:
        """A sign of life."""

    async def started(self) -> tuple[int, int]:
        """Its HTTP and gRPC ports, once it answers. Raises InvalidParameter where they are taken."""
        await asyncio.shield(self._started)
        return self._gateway.http_port, self._gateway.grpc_port

    async def run(self) -> None:
        """Until `stop`, or a failure."""
        await asyncio.shield(self._started)
        stopped = asyncio.ensure_future(self._stopped.wait())
        await asyncio.wait((stopped, self._gateway.failed), return_when=asyncio.FIRST_COMPLETED)
        if self._gateway.failed.done():
            failure: ServerError = self._gateway.failed.result()
            raise failure

    async def stop(self, drain_seconds: float | None) -> None:
        """Finishes what runs, for so long (None: as configured), and ends."""
        await self._gateway.drain(self._config.shutdown_timeout if drain_seconds is None else drain_seconds)
        await self._gateway.stop()
        self._stopped.set()

    async def why(self, request_id: str) -> list[WaitingRequest]:
        """What a request here waits for; of all that wait, for ""."""
        return await self._gateway.models.why(request_id)
