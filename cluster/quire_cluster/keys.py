"""Keys that callers send as `Authorization: Bearer KEY` or `x-api-key: KEY`: over HTTP, over gRPC, and from gateway to
replica."""

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from pathlib import Path

from quire_engine.errors import InvalidParameter

HEADER, OTHER_HEADER = "authorization", "x-api-key"
VARIABLE = "QUIRE_API_KEY"
_FILE_BYTES = 1 << 20


class Keys:
    """The keys that are good, known by their digests alone. Equal to others of the same keys."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = frozenset(digest(key) for key in keys)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Keys) and self._digests == other._digests

    def __hash__(self) -> int:
        return hash(self._digests)

    def match(self, given: str) -> bool:
        """Whether it is one of them; how long that takes tells nothing of them."""
        sent = digest(given)
        found = [hmac.compare_digest(sent, known) for known in self._digests]
        return any(found)


def digest(key: str) -> bytes:
    """By which a key is known (32 bytes). Keys are long and random: there is no need to make guessing them slow."""
    return hashlib.sha256(key.encode()).digest()


def key_in(authorization: Sequence[str], api_key: Sequence[str]) -> str:
    """The key that headers of these two names send (each may be there once; both, where they say the same); else "".
    The name of the scheme, Bearer, is case-insensitive."""
    if len(authorization) > 1 or len(api_key) > 1:
        return ""
    scheme, _, bearer_s = (authorization or [""])[0].partition(" ")
    sent = {bearer_s.strip() if scheme.lower() == "bearer" else ""} if authorization else set()
    sent |= {one.strip() for one in api_key}
    return sent.pop() if len(sent) == 1 else ""


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
