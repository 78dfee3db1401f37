"""Connections of the HTTP server: uvicorn's, with the limits it lacks. All of them hold before anyone shows a key."""

import contextlib
import resource
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httptools
import orjson
import uvicorn
from quire_engine.errors import InvalidParameter
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from quire_cluster.gateway.doors import OPEN_ROUTES
from quire_cluster.gateway.http import error_body, json_response

_HEAD_BYTES = 64 << 10  # of a request's first line and headers
_UNREAD_BYTES = 1 << 20  # of a body that goes on after its answer
_PIPELINED = 32  # requests that wait for the answer to the one before them
_RESERVE = 64  # connections beyond the limit that are told so, and answered about health
_IDLE = 75  # seconds between two requests
_OPEN_FILES = 1 << 20
BACKLOG = 4096  # connections that nobody has accepted yet
_OTHER_FILES = 256  # that a server needs besides its connections, _RESERVE among them


@dataclass(frozen=True)
class Limits:
    """Times in seconds: until the head of a request is there, until its body is, and until a client that has unread
    bytes takes some."""

    connections: int
    head: float
    body: float
    write: float


def raise_open_files(wanted: int) -> int:
    """Lets this process and its children open as many files as the system allows it; returns how many
    connections of HTTP, and as many of gRPC, that is enough for: `wanted`, or fewer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, (soft - _OTHER_FILES) // 2))


def _refusal(status: int, why: str) -> ASGIApp:
    """An application that says no and hangs up."""

    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        response = json_response(error_body(InvalidParameter(why), status), status)
        response.headers["Connection"] = "close"
        if status == 503:
            response.headers["Retry-After"] = "1"
        await response(scope, receive, send)

    return refuse


_TOO_LONG = f"the request's headers have more than {_HEAD_BYTES} bytes, which is the most that is read"
_CROWDED = "too many connections are open; try again"
_head_too_long = _refusal(431, _TOO_LONG)
_crowded = _refusal(503, _CROWDED)


class Connection(HttpToolsProtocol):
    """One connection. `check` is called every second."""

    def __init__(self, config: "HttpConfig", server_state: Any, app_state: dict[str, Any], _loop: Any = None) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limits = config.limits
        self._answers = self.app
        self._head_since: float | None = None  # when its first byte was due
        self._head_bytes = 0  # of a head that is not whole
        self._body_since: float | None = None
        self._body_bytes = 0
        self._bodiless = 0  # bytes since the last one of a head or a body: of its framing, and of trailers
        self._unread: tuple[int, float] | None = None  # bytes that the client has not taken, and since when
        self._due: deque[RequestResponseCycle] = deque()  # requests without a whole answer, the one that runs first

    def connection_made(self, transport: Any) -> None:
        """Beyond the limit, connections that idle make room."""
        super().connection_made(transport)
        self._head_since = self.loop.time()
        if is_full(self.connections, self._limits.connections):
            self._hang_up(503, _CROWDED)

    def connection_lost(self, exc: Exception | None) -> None:
        """Told to every request of it: uvicorn tells the last one alone, and not the one that runs."""
        for cycle in self._due:
            _end(cycle)
        super().connection_lost(exc)

    @property
    def idle(self) -> bool:
        """Between two requests, the answer to the first on its way."""
        return self.timeout_keep_alive_task is not None and self.transport.get_write_buffer_size() == 0

    def data_received(self, data: bytes) -> None:
        """An offer to upgrade (to HTTP/2, say) is not taken. The parser believes that it is, and that no body follows:
        so it gets the head again, without the offer."""
        self._unset_keepalive_if_required()
        in_head = self._head_since is not None
        self._bodiless += len(data)
        rest = memoryview(data)
        try:
            while rest:
                try:
                    self.parser.feed_data(rest)
                    break
                except httptools.HttpParserUpgrade as offer:
                    if self.parser.get_method() == b"CONNECT":
                        self._hang_up(501, "this server is no proxy")
                        return
                    self.parser.feed_data(self._head_without_offer())
                    rest = rest[offer.args[0] :]
        except httptools.HttpParserError:
            self._hang_up(400, "this is no HTTP/1.1 request")
            return
        self._head_bytes = self._head_bytes + len(data) if in_head and self._head_since is not None else 0
        if self._head_bytes > _HEAD_BYTES:
            self._hang_up(431, _TOO_LONG)
        elif self._body_since is not None and self._bodiless > _HEAD_BYTES:
            self._hang_up(431, f"more than {_HEAD_BYTES} bytes came without any of the body")
        elif len(self.pipeline) > _PIPELINED:
            self.transport.abort()
        elif self._head_since is None and self._body_since is None and self.cycle.response_complete:
            # The rest of a body that was answered before, or a blank line: it is between two requests again.
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _head_without_offer(self) -> bytes:
        first = b" ".join((self.parser.get_method(), self.url, b"HTTP/" + self.parser.get_http_version().encode()))
        lines = [first]
        for name, value in self.headers:
            if name == b"connection":
                value = b",".join(token for token in value.split(b",") if token.strip().lower() != b"upgrade")
            if name != b"upgrade":
                lines.append(name + b": " + value)
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        if self._head_since is None:
            self._head_since = self.loop.time()

    def on_headers_complete(self) -> None:
        """Who answers is decided here."""
        if self.parser.should_upgrade():
            return
        self._head_since, self._body_since, self._body_bytes, self._bodiless = None, self.loop.time(), 0, 0
        crowded = len(self.connections) > self._limits.connections
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > _HEAD_BYTES:
            self.app, self.url = _head_too_long, b"/"
        elif crowded and self.url.partition(b"?")[0].decode("latin-1") not in OPEN_ROUTES:
            self.app = _crowded
        else:
            self.app = self._answers
        super().on_headers_complete()
        self._due.append(self.cycle)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Of a head. A trailer, after the body, may be left out (RFC 9110, 6.5.1)."""
        if self._head_since is not None:
            super().on_header(name, value)

    def on_response_complete(self) -> None:
        """The next one runs."""
        self._due.popleft()
        super().on_response_complete()

    def on_body(self, body: bytes) -> None:
        """What comes after the answer is read too, for a while: a client that is hung up on while it sends may miss
        the answer."""
        super().on_body(body)
        self._bodiless = 0
        if self.cycle.response_complete:
            self._body_bytes += len(body)
            if self._body_bytes > _UNREAD_BYTES:
                self.transport.close()

    def on_message_complete(self) -> None:
        """The body is whole."""
        if not self.parser.should_upgrade():
            super().on_message_complete()
            self._body_since = None

    def check(self) -> None:
        """Hangs up on who takes too long."""
        now, limits = self.loop.time(), self._limits
        if self.pipeline and self._body_since is not None:
            self._body_since = now  # it is not read before its turn
        if self._head_since is not None and now - self._head_since > limits.head:
            if self._head_bytes:
                self._hang_up(408, f"the request's headers took more than {limits.head:g} s")
            else:
                self.transport.close()
        elif self._body_since is not None and now - self._body_since > limits.body:
            self._hang_up(408, f"the request's body took more than {limits.body:g} s")
        size = self.transport.get_write_buffer_size()
        if size == 0:
            self._unread = None
        elif self._unread is None or size < self._unread[0]:
            self._unread = (size, now)
        elif now - self._unread[1] > limits.write:
            self.transport.abort()
        else:
            self._unread = (size, self._unread[1])

    def _hang_up(self, status: int, why: str) -> None:
        """Says why, unless that would come within or before another answer: to a head, where none is due; within a
        body, instead of its own answer, if that is the next and has not begun."""
        cycle = self.cycle
        if self._body_since is not None:
            may_say = not self.pipeline and not cycle.response_started
        else:
            may_say = cycle is None or cycle.response_complete
        self._head_since = self._body_since = None
        if may_say:
            content = orjson.dumps(error_body(InvalidParameter(why), status))
            head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(content)
            self.transport.write(STATUS_LINE[status] + head + content)
        for unanswered in self._due:
            _end(unanswered)
        self.transport.close()


def is_full(connections: set[Any], limit: int) -> bool:
    """Whether one that has just come is hung up on: beyond the limit and _RESERVE, where none idles that could make
    room."""
    if len(connections) <= limit:
        return False
    idle = next((other for other in connections if isinstance(other, Connection) and other.idle), None)
    if idle is None:
        return len(connections) > limit + _RESERVE
    connections.discard(idle)
    idle.transport.close()
    return False


def _end(cycle: RequestResponseCycle) -> None:
    """Nobody waits for its answer any more."""
    cycle.disconnected = True
    cycle.message_event.set()


class HttpConfig(uvicorn.Config):
    """uvicorn's configuration, with limits for its connections."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        super().__init__(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            timeout_graceful_shutdown=1,
            timeout_keep_alive=_IDLE,
            backlog=BACKLOG,
        )
        self.limits = limits


class HttpServer(uvicorn.Server):
    """uvicorn's server, which looks at its connections every second and leaves signals to others."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Not here."""
        yield

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        if counter % 10 == 0:
            for connection in tuple(self.server_state.connections):
                if isinstance(connection, Connection):
                    connection.check()
        return await super().on_tick(counter)
