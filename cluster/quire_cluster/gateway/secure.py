"""The HTTP server over TLS. What has connected counts, and has to hurry, before TLS is agreed on: so connections are
accepted here; a server of the event loop would tell of them afterwards."""

import asyncio
import logging
import socket

from quire_cluster.gateway.connection import Connection, HttpConfig, HttpServer, is_full
from quire_cluster.gateway.tls import Tls

log = logging.getLogger(__name__)
_PAUSE = 0.5  # seconds until it is accepted again, where the system could not


class SecureConnection(Connection):
    """One that has no transport until TLS is agreed on, which `agreeing` waits for."""

    agreeing: "asyncio.Task[None]"

    def check(self) -> None:
        """The handshake has a clock of its own."""
        if self.transport is not None:
            super().check()

    def shutdown(self) -> None:
        """The server ends."""
        if self.transport is not None:
            super().shutdown()
        else:
            self.agreeing.cancel()


class SecureHttpServer(HttpServer):
    """The certificate is what `tls` has at the moment when a client connects."""

    def __init__(self, config: HttpConfig, tls: Tls) -> None:
        super().__init__(config)
        self._http, self._limits = config, config.limits
        self._tls = tls
        self._accepting: list[asyncio.Task[None]] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """On listening sockets."""
        await super().startup([])
        self._accepting = [asyncio.create_task(self._accept(listener)) for listener in sockets or ()]

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accepts no more, and ends what is there."""
        for task in self._accepting:
            task.cancel()
        await super().shutdown(sockets)

    async def on_tick(self, counter: int) -> bool:
        """Raises what accepting failed with."""
        for task in self._accepting:
            if task.done():
                task.result()
        return await super().on_tick(counter)

    async def _accept(self, listener: socket.socket) -> None:
        listener.setblocking(False)
        loop = asyncio.get_running_loop()
        connections, tasks = self.server_state.connections, self.server_state.tasks
        while True:
            try:
                accepted, _ = await loop.sock_accept(listener)
            except OSError as error:  # who wanted in has gone, or no more files may be open
                log.warning("a connection could not be accepted: %s", error)
                await asyncio.sleep(_PAUSE)
                continue
            connection = SecureConnection(self._http, self.server_state, self.lifespan.state)
            connections.add(connection)
            if is_full(connections, self._limits.connections):
                connections.discard(connection)
                accepted.close()
            else:
                connection.agreeing = asyncio.create_task(self._agree(accepted, connection))
                tasks.add(connection.agreeing)
                connection.agreeing.add_done_callback(tasks.discard)
            await asyncio.sleep(0)  # who is connected already gets a turn

    async def _agree(self, accepted: socket.socket, connection: SecureConnection) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: connection,
                accepted,
                ssl=self._tls.context,
                ssl_handshake_timeout=self._limits.head,
                ssl_shutdown_timeout=self._limits.write,
            )
        except OSError as error:  # too late, or no TLS, or a client without a good certificate
            log.debug("TLS was not agreed on: %s", error)
        finally:
            if connection.transport is None:
                self.server_state.connections.discard(connection)
