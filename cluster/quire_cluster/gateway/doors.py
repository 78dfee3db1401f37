"""What stands before the routes: which sites may call, who, and how much of a body is held at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from quire_engine.errors import InvalidParameter, QuireError, Unauthenticated, Unavailable
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quire_cluster.addresses import is_loopback
from quire_cluster.gateway.http import error_body, error_response, json_response
from quire_cluster.governance.identity import Credentials, Identity, answer_for
from quire_cluster.keys import HEADER, OTHER_HEADER, key_in

OPEN_ROUTES = ("/health", "/ready")
_HELD_BODIES = 256 << 20  # bytes of all bodies that are being read
_LOCAL = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Doors:
    """`identity`: None lets everybody in. `hosts`: the names this server answers to; None: any, and calls from any
    site. `origins`: sites whose scripts may call it ("*": all)."""

    identity: Identity | None = None
    hosts: tuple[str, ...] | None = None
    origins: tuple[str, ...] = ()

    @staticmethod
    def of(listens_on: str, identity: Identity | None, hosts: Sequence[str], origins: Sequence[str]) -> "Doors":
        """A server for this machine alone answers to its own names: another name that leads here is a web page's
        trick (DNS rebinding), unless it is among `hosts`."""
        local = (*_LOCAL, listens_on) if is_loopback(listens_on) else ()
        names = tuple(name.lower().removeprefix("[").removesuffix("]") for name in (*local, *hosts))
        return Doors(identity, names or None, tuple(origins))

    def before(self, app: ASGIApp) -> ASGIApp:
        """The application behind these doors; the first that a request meets is the last here."""
        app = BodyCheck(app)
        if self.identity is not None:
            app = CallerCheck(app, self.identity)
        if self.origins:
            app = CORSMiddleware(app, self.origins, allow_methods=("GET", "HEAD", "POST"), allow_headers=("*",))
        return SiteCheck(app, self.hosts, self.origins)


async def _refuse(
    status: int, why: str, scope: Scope, receive: Receive, send: Send, headers: dict[str, str] | None = None
) -> None:
    response = json_response(error_body(InvalidParameter(why), status), status)
    response.headers.update(headers or {})
    await response(scope, receive, send)


def _values(scope: Scope, name: str) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name.encode()]


def _host_of(address: str) -> str | None:
    """example.org of example.org:80 and of [::1]:80 ::1."""
    try:
        return urlsplit(f"//{address}").hostname
    except ValueError:
        return None


class SiteCheck:
    """Refuses calls by another name than this server's, and those that a browser makes for another site."""

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...] | None, origins: tuple[str, ...]) -> None:
        self._app = app
        self._hosts = hosts
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        hosts = _values(scope, "host")
        if len(hosts) > 1 or (not hosts and scope["http_version"] != "1.0"):
            await _refuse(400, "send one Host header", scope, receive, send)
            return
        if self._hosts is not None and hosts and _host_of(hosts[0]) not in self._hosts:
            why = f"{hosts[0][:100]!r} is not a name of this server; make it one with --allowed-hosts"
            await _refuse(403, why, scope, receive, send)
            return
        for origin in _values(scope, "origin"):
            if not self._welcome(origin):
                why = f"pages of {origin[:100]!r} may not call this server; let them with --allowed-origins"
                await _refuse(403, why, scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _welcome(self, origin: str) -> bool:
        if self._hosts is None or "*" in self._origins or origin in self._origins:
            return True
        return _host_of(origin.partition("://")[2]) in self._hosts


class CallerCheck:
    """Every route but health and readiness is for callers who are known. They are before the body is read."""

    def __init__(self, app: ASGIApp, identity: Identity) -> None:
        self._app = app
        self._identity = identity

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] not in OPEN_ROUTES:
            given = Credentials(
                key=key_in(_values(scope, HEADER), _values(scope, OTHER_HEADER)),
                address=scope["client"][0] if scope.get("client") else "",
                forwarded_for=", ".join(_values(scope, "x-forwarded-for")),
            )
            try:
                answer_for(await self._identity.caller(given))
            except QuireError as error:
                response = error_response(error)
                if isinstance(error, Unauthenticated):
                    response.headers["WWW-Authenticate"] = "Bearer"
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


class BodyCheck:
    """Bodies are read as they are, and those that are being read are bounded together."""

    def __init__(self, app: ASGIApp, *, held: int = _HELD_BODIES) -> None:
        self._app = app
        self._left = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        coding = ", ".join(_values(scope, "content-encoding"))
        if coding not in ("", "identity"):
            why = f"bodies are read as they are, not as Content-Encoding {coding[:100]!r}"
            await _refuse(415, why, scope, receive, send, {"Accept-Encoding": "identity"})
            return
        held = 0

        async def counted() -> Message:
            nonlocal held
            message = await receive()
            size = len(message.get("body", b""))
            if message.get("more_body", False) and size <= self._left:
                self._left -= size
                held += size
                return message
            self._left += held  # whole, or given up
            held = 0
            if message.get("more_body", False):
                raise Unavailable("too much is being sent to this server at once; try again")
            return message

        try:
            await self._app(scope, counted, send)
        finally:
            self._left += held
