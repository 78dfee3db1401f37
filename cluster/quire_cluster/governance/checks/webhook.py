"""Asking a policy over HTTP, as Open Policy Agent is asked."""

import json
from collections.abc import Mapping

import aiohttp

from quire_cluster.governance.checks.asking import Unanswered

_MOST_BYTES = 1 << 20
_HEADERS = {"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "quire"}


class Webhooks:
    """Posts JSON, and keeps connections for the next. Nothing that the environment says of proxies or passwords counts,
    and no redirection is followed. It belongs to one event loop; `close` it there."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def post(self, url: str, body: Mapping[str, object], timeout: float) -> Mapping[str, object]:
        """The JSON object that is answered, of at most 1 MiB. `timeout`: seconds, from first to last. Raises Unanswered
        or TimeoutError."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                cookie_jar=aiohttp.DummyCookieJar(), headers=_HEADERS, auto_decompress=False, trust_env=False
            )
        limit = aiohttp.ClientTimeout(total=timeout)
        try:
            async with self._session.post(url, json=body, allow_redirects=False, timeout=limit) as response:
                if response.status != 200:
                    raise Unanswered(f"its webhook answers {response.status}, not 200")
                if response.headers.get("Content-Encoding", "identity").lower() != "identity":
                    raise Unanswered("its webhook's answer is packed, though asked not to be")
                answer = await _limited(response.content)
        except aiohttp.ClientError as error:
            raise Unanswered(
                f"its webhook cannot be reached, or its answer broke off: {type(error).__name__}"
            ) from error
        try:
            read = json.loads(answer)
        except (ValueError, RecursionError) as error:
            raise Unanswered("its webhook's answer is no JSON") from error
        if not isinstance(read, dict):
            raise Unanswered("its webhook's answer is no JSON object")
        return read

    async def close(self) -> None:
        """What is under way fails."""
        if self._session is not None:
            await self._session.close()


async def _limited(content: aiohttp.StreamReader) -> bytes:
    pieces, size = [], 0
    async for piece in content.iter_any():
        size += len(piece)
        if size > _MOST_BYTES:
            raise Unanswered(f"its webhook's answer has more than {_MOST_BYTES} bytes")
        pieces.append(piece)
    return b"".join(pieces)
