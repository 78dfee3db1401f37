"""Who sent a call: by its key, or whatever else it brings."""

import inspect
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Protocol
from urllib.parse import unquote

import grpc
from quire_engine.errors import QuireError, Unauthenticated

from quire_cluster.governance.callers import ANYONE, Caller
from quire_cluster.governance.peers import peer_name
from quire_cluster.keys import HEADER, OTHER_HEADER, Keys, key_in


@dataclass(frozen=True, kw_only=True, slots=True)
class Credentials:
    """What a call brings."""

    key: str  # or a token of an identity provider; "": none
    certificate: str = ""  # the name in its client certificate, which was verified
    address: str = ""  # where it comes from
    forwarded_for: str = ""  # whom a proxy says that it calls for: believed by nobody, and put on record


class Identity(Protocol):
    """Knows callers."""

    async def caller(self, given: Credentials) -> Caller:
        """Raises Unauthenticated; Unavailable where nobody can be known now."""


class SharedKeys:
    """One of some keys, which tell nobody from anybody."""

    def __init__(self, keys: Keys, refusal: str | None = None) -> None:
        """`refusal`: what is told to others."""
        self._keys = keys
        self._refusal = refusal or "missing or wrong API key; send 'Authorization: Bearer KEY'"

    async def caller(self, given: Credentials) -> Caller:
        """Anyone who has one."""
        if not self._keys.match(given.key):
            raise Unauthenticated(self._refusal)
        return replace(ANYONE, address=given.address, forwarded_for=given.forwarded_for)


_caller: ContextVar[Caller] = ContextVar("caller", default=ANYONE)


def calling() -> Caller:
    """Who sent the call that is being answered; anyone, where nobody is asked."""
    return _caller.get()


def answer_for(caller: Caller) -> None:
    """From here on, in this task and those that it begins."""
    _caller.set(caller)


class CallerCheck(grpc.aio.ServerInterceptor):
    """Refuses every call of a stream of requests from nobody who is known (UNAUTHENTICATED), before its first message
    is read. In front of one that makes all methods such: these alone begin before a message is there."""

    def __init__(self, identity: Identity, *, open_services: Sequence[str] = ()) -> None:
        """`open_services`: anybody may call those."""
        self._identity = identity
        self._open = tuple(f"/{service}/" for service in open_services)

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """Around every method."""
        handler = await continuation(details)
        if handler is None or details.method.startswith(self._open):
            return handler
        assert handler.request_streaming, f"{details.method} would be read before its caller is known"

        async def check(context: Any) -> None:
            try:
                answer_for(await self._identity.caller(_credentials(context)))
            except Unauthenticated as error:
                await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
            except QuireError as error:
                await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))

        inner = handler.stream_stream or handler.stream_unary

        async def answer(requests: Any, context: Any) -> Any:
            await check(context)
            return await inner(requests, context)

        async def converse(requests: Any, context: Any) -> AsyncIterator[Any]:
            await check(context)
            async with aclosing(inner(requests, context)) as responses:
                async for response in responses:
                    yield response

        read, write = handler.request_deserializer, handler.response_serializer
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(answer, read, write)
        return grpc.stream_stream_rpc_method_handler(
            converse if inspect.isasyncgenfunction(inner) else answer, read, write
        )


def _credentials(context: Any) -> Credentials:
    metadata: dict[str, list[str]] = {}
    for name, value in context.invocation_metadata():
        metadata.setdefault(name, []).append(str(value))
    return Credentials(
        certificate=peer_name(context) or "",
        key=key_in(metadata.get(HEADER, []), metadata.get(OTHER_HEADER, [])),
        address=unquote(context.peer()).partition(":")[2].rpartition(":")[0],  # of ipv4:10.0.0.1:80, ipv6:%5B::1%5D:80
        forwarded_for=", ".join(metadata.get("x-forwarded-for", [])),
    )
