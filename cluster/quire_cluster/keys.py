"""Keys that callers send as `Authorization: Bearer KEY`: over HTTP, over gRPC, and from gateway to replica."""

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
from quire_engine.errors import InvalidParameter

HEADER = "authorization"
VARIABLE = "QUIRE_API_KEY"
_FILE_BYTES = 1 << 20


class Keys:
    """The keys that are good, known by their digests alone. Equal to others of the same keys."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = frozenset(_digest(key) for key in keys)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Keys) and self._digests == other._digests

    def __hash__(self) -> int:
        return hash(self._digests)

    def match(self, given: str) -> bool:
        """Whether the header's value names one of them; how long that takes tells nothing of them. The scheme's name
        is case-insensitive."""
        scheme, _, key = given.partition(" ")
        sent = _digest(key.strip())
        found = [hmac.compare_digest(sent, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(found)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def read_keys(key: str | None, file: str | None, environment: Mapping[str, str]) -> Keys | None:
    """The keys of --api-key or --api-key-file (one a line), or else of the environment; None where no key was given.
    Raises InvalidParameter for one that no header can carry, and above all for an empty one."""
    if key is not None and file is not None:
        raise InvalidParameter("give either --api-key or --api-key-file", "api_key_file")
    if file is not None:
        try:
            with Path(file).open("rb") as opened:
                data = opened.read(_FILE_BYTES + 1)
            lines = data.decode().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidParameter(f"--api-key-file cannot be read: {error}", "api_key_file") from error
        if len(data) > _FILE_BYTES:
            raise InvalidParameter(f"--api-key-file {file} has more than {_FILE_BYTES} bytes", "api_key_file")
        keys, source = [line.strip() for line in lines if line.strip()], "--api-key-file"
        if not keys:
            raise InvalidParameter(f"--api-key-file {file} has no key; write one a line", "api_key_file")
    elif key is not None:
        keys, source = [key], "--api-key"
    elif VARIABLE in environment:
        keys, source = [environment[VARIABLE]], VARIABLE
    else:
        return None
    for one in keys:
        if not (one.isascii() and one.isprintable() and one and " " not in one):
            raise InvalidParameter(
                f"{source} holds an empty key, or one with spaces or other than ASCII characters; "
                "give another, or none at all to let everybody in",
                "api_key",
            )
    return Keys(keys)


def bearer(key: str) -> tuple[tuple[str, str], ...]:
    """Metadata of a gRPC call that sends a key."""
    return ((HEADER, f"Bearer {key}"),)


class KeyInterceptor(grpc.aio.ServerInterceptor):
    """Refuses every call without a key (UNAUTHENTICATED), before its first message is read."""

    def __init__(self, keys: Keys, *, refusal: str, open_services: Sequence[str] = ()) -> None:
        """`refusal`: what the caller is told. `open_services`: who calls those needs no key."""
        self._keys = keys
        self._open = tuple(f"/{service}/" for service in open_services)

        async def refuse(requests: Any, context: Any) -> None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, refusal)

        # Of streams of requests, whatever the method takes: these alone begin before a message is there.
        self._refusals = {
            False: grpc.stream_unary_rpc_method_handler(refuse),
            True: grpc.stream_stream_rpc_method_handler(refuse),
        }

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """Checked per call, before its handler sees anything."""
        handler = await continuation(details)
        if handler is None or details.method.startswith(self._open):
            return handler
        if self._keys.match(str(dict(details.invocation_metadata).get(HEADER, ""))):
            return handler
        return self._refusals[handler.response_streaming]
