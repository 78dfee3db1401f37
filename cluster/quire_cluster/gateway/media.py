"""The bytes of what a call names by a URL: in the URL itself, on another server, or in a folder of this machine.

Other servers and folders are closed until an operator opens them. A server is connected to only at an address that was
checked (`hosts.py`), at every step of a redirection; a file is opened step by step from the folder, so that no link
leads out of it, even one that is put there meanwhile. Errors tell no more than the caller knew: neither what another
server sent nor where its name leads.
"""

import asyncio
import errno
import ipaddress
import os
import re
import socket
import stat
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote_to_bytes

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from quire_engine.errors import InvalidParameter
from quire_engine.multimodal.pictures import PictureLimits, check_size, data_url, wrong
from yarl import URL

from quire_cluster.config import MediaConfig, entries
from quire_cluster.hosts import Hosts, canonical, unwrapped

Resolve = Callable[[str, int], Awaitable[list[str]]]

_MOST_URL = 8192  # characters, but of a data URL
_MOST_REDIRECTIONS = 5
_AT_ONCE = 16  # servers that are read from
_PIECE = 1 << 16  # bytes
_NOT_IN_URLS = re.compile("[\x00-\x20\x7f\\\\\ud800-\udfff]")
_REDIRECTIONS = (301, 302, 303, 307, 308)
_HEADERS = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "quire"}
_INSTEAD = "or send the file in the call, as data:image/png;base64,..."


class Media:
    """Where `config` lets them be read. `resolve`: a name's addresses, as texts; None: the system's.

    `timeout` bounds a fetch from first to last, redirections included; `read_timeout` each wait for more of it: both
    in seconds. Some are fetched at a time; others wait for their turn. It belongs to one event loop.
    """

    def __init__(
        self,
        config: MediaConfig,
        limits: PictureLimits,
        *,
        resolve: Resolve | None = None,
        timeout: float = 10.0,
        read_timeout: float = 5.0,
    ) -> None:
        self._hosts = Hosts(entries(config.allowed_media_domains))
        self._folder = config.allowed_local_media_path
        self._limits = limits
        self._timeout = timeout
        self._read_timeout = read_timeout
        self._names = ThreadPoolExecutor(_AT_ONCE, "names")  # its own: a name server that hangs holds up nobody else
        self._resolve = resolve or self._ask_system
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._session: aiohttp.ClientSession | None = None
        self._closed = False

    async def read(self, url: str, what: str) -> bytes:
        """What a `data:`, `http:`, `https:` or `file:` URL names.

        Raises InvalidParameter, whose message begins with `what`: which part of a call this is.
        """
        scheme = url[:8].partition(":")[0].lower()
        if scheme == "data":
            if len(url) <= _PIECE:
                return data_url(url, what, self._limits)
            return await asyncio.to_thread(data_url, url, what, self._limits)
        if scheme not in ("http", "https", "file"):
            raise wrong(what, "it is no data:, https:, http: or file: URL; send data:image/png;base64,...")
        if len(url) > _MOST_URL:
            raise wrong(what, f"the URL has {len(url)} characters, and {_MOST_URL} are read; shorten it, {_INSTEAD}")
        if _NOT_IN_URLS.search(url):
            raise wrong(what, r"the URL holds white space, a \ or what is no text; write it with %20, %5C and so on")
        if scheme == "file":
            return await asyncio.to_thread(self._read_file, url, what)
        if not self._hosts:
            raise wrong(what, f"this server fetches no URLs; have it started with --allowed-media-domains, {_INSTEAD}")
        async with self._turns:
            return await self._fetch(url, what)

    async def close(self) -> None:
        """Fetches that still run or wait fail."""
        self._closed = True
        if self._session is not None:
            await self._session.close()
        self._names.shutdown(wait=False)

    async def _fetch(self, url: str, what: str) -> bytes:
        """With an end to all that may go wrong on the way."""
        try:
            async with asyncio.timeout(self._timeout):
                return await self._follow(url, what)
        except TimeoutError as error:
            raise wrong(what, f"its server took too long; try again, {_INSTEAD}") from error
        except aiohttp.ClientConnectorDNSError as error:
            raise wrong(what, f"its host has no address that may be fetched from; mend it, {_INSTEAD}") from error
        except aiohttp.ClientConnectorError as error:
            raise wrong(what, f"no connection to its server could be made; mend the URL, {_INSTEAD}") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:  # anything that a server may send
            raise wrong(what, f"its server's answer broke off or is no HTTP; try again, {_INSTEAD}") from error

    async def _follow(self, text: str, what: str) -> bytes:
        url = self._checked(text, what)
        for _ in range(1 + _MOST_REDIRECTIONS):
            async with self._connected().get(url, allow_redirects=False) as response:
                try:
                    if response.status == 200:
                        return await self._body(response, what)
                    if response.status not in _REDIRECTIONS:
                        raise wrong(what, f"its server answered {response.status}, not 200; mend the URL, {_INSTEAD}")
                    url = self._next(url, response, what)
                finally:
                    response.close()  # whatever is left of it is not read
        raise wrong(what, f"its server leads on more than {_MOST_REDIRECTIONS} times; send the last URL, {_INSTEAD}")

    def _connected(self) -> aiohttp.ClientSession:
        """Made when the first URL comes. Each fetch has its connection, and keeps none."""
        if self._closed:
            raise aiohttp.ClientConnectionError("closed")
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    resolver=_CheckedNames(self._hosts, self._resolve),
                    use_dns_cache=False,
                    force_close=True,
                    limit=_AT_ONCE,
                ),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._timeout, sock_read=self._read_timeout),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers=_HEADERS,
                auto_decompress=False,
                trust_env=False,
            )
        return self._session

    def _checked(self, text: str, what: str) -> URL:
        """A URL whose host may be asked, put together anew of the parts that were looked at."""
        try:
            url = URL(text, encoded=text.isascii())
            host, port = canonical(url.raw_host or ""), url.port
        except ValueError as error:
            raise wrong(what, "the host in the URL is no name and no address; write it in full") from error
        if url.scheme not in ("http", "https") or not port:
            raise wrong(what, "the URL is not complete; write https://, a host, and a path")
        if "@" in url.raw_authority:
            raise wrong(what, "the URL holds a user's name or password; leave it out")
        shown = f"[{host}]" if ":" in str(host) else str(host)
        if not self._hosts.may_be_asked(host, port):
            raise wrong(what, f"{shown:.100}:{port} is not among --allowed-media-domains; have it added, {_INSTEAD}")
        return URL.build(
            scheme=url.scheme,
            host=shown,
            port=None if url.is_default_port() else port,
            path=url.raw_path,
            query_string=url.raw_query_string,
            encoded=True,
        )

    def _next(self, url: URL, response: aiohttp.ClientResponse, what: str) -> URL:
        """Where a redirection leads. Its errors hold nothing of it."""
        refused = f"its server leads on to a URL that may not be fetched; send the last URL, {_INSTEAD}"
        location = response.headers.get("Location", "")
        if not location or _NOT_IN_URLS.search(location):
            raise wrong(what, refused)
        try:
            return self._checked(str(url.join(URL(location, encoded=location.isascii()))), what)
        except (InvalidParameter, ValueError) as error:
            raise wrong(what, refused) from error

    async def _body(self, response: aiohttp.ClientResponse, what: str) -> bytes:
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise wrong(what, f"its server sends it packed, though asked not to; mend the server, {_INSTEAD}")
        check_size(response.content_length or 0, what, self._limits)
        pieces, size = [], 0
        async for piece in response.content.iter_chunked(_PIECE):
            size += len(piece)
            check_size(size, what, self._limits)
            pieces.append(piece)
        return b"".join(pieces)

    async def _ask_system(self, name: str, port: int) -> list[str]:
        found = await asyncio.get_running_loop().run_in_executor(
            self._names, lambda: socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
        )
        return [str(address[0]) for *_, address in found]

    def _read_file(self, url: str, what: str) -> bytes:
        if self._folder is None:
            raise wrong(
                what,
                f"this server reads no files of its own; have it started with --allowed-local-media-path, {_INSTEAD}",
            )
        found = re.fullmatch(r"file://(?:localhost)?(/[^?#]*)", url, re.IGNORECASE)
        if not found:
            raise wrong(what, "a file's URL is written as file:///folder/picture.png; send it so")
        path = os.fsdecode(unquote_to_bytes(found[1]))
        try:
            return _read_below(self._folder, path, what, self._limits)
        except (OSError, ValueError) as error:
            raise wrong(
                what, f"there is no such file below --allowed-local-media-path; mend the URL, {_INSTEAD}"
            ) from error


class _CheckedNames(AbstractResolver):
    """Leaves of a name's addresses those that it may lead to. They are what is connected to: it is not asked again."""

    def __init__(self, hosts: Hosts, resolve: Resolve) -> None:
        self._hosts = hosts
        self._resolve = resolve

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Raises OSError where none is left."""
        try:
            found = [unwrapped(ipaddress.ip_address(text)) for text in await self._resolve(host, port)]
        except ValueError as error:
            raise OSError(errno.EHOSTUNREACH, "it cannot be looked up") from error
        checked = [
            ResolveResult(
                hostname=host,
                host=str(address),
                port=port,
                family=socket.AF_INET if address.version == 4 else socket.AF_INET6,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in found
            if self._hosts.may_lead_to(host, address, port)
        ]
        if not checked:
            raise OSError(errno.EHOSTUNREACH, "it leads nowhere that may be fetched from")
        return checked

    async def close(self) -> None:
        """It holds nothing."""


def _read_below(folder: str, path: str, what: str, limits: PictureLimits) -> bytes:
    """Raises OSError or ValueError where the folder has no such file, InvalidParameter where it is too large."""
    root = os.path.realpath(folder)
    asked = Path(os.path.normpath(path))
    if not any(asked.is_relative_to(name) for name in (root, os.path.abspath(folder))):
        raise FileNotFoundError(errno.ENOENT, "outside")  # and what is there is not even looked at
    *steps, name = Path(os.path.realpath(asked)).relative_to(root).parts
    directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for step in steps:
            inner = os.open(step, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=directory)
            os.close(directory)
            directory = inner
        # Not to wait for who would write into a pipe.
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY, dir_fd=directory)
    finally:
        os.close(directory)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise FileNotFoundError(errno.ENOENT, "no regular file")
        check_size(status.st_size, what, limits)
        data = file.read(limits.max_bytes + 1)
    check_size(len(data), what, limits)
    return data
