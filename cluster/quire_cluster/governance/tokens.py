"""Tokens of identity providers (JWTs, as OpenID Connect issues them): who they say is calling."""

import asyncio
import hashlib
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import aiohttp
import jwt
from pydantic import BaseModel, ConfigDict, Field, field_validator
from quire_engine.errors import InvalidParameter, Unauthenticated, Unavailable

from quire_cluster.addresses import is_loopback
from quire_cluster.governance.callers import Role

log = logging.getLogger(__name__)
_MOST_CHARACTERS = 16 << 10  # of a token; headers have no room for more
_MOST_KEYS = 256  # of a provider
_MOST_BYTES = 1 << 20  # of its answer
_MOST_KNOWN = 4096  # tokens that were verified, of all providers
_LATEST = 1 << 40  # seconds since 1970
_FETCH = 10.0  # seconds that a provider may take
_BETWEEN = 30.0  # seconds between two fetches for keys that are not known
_REFRESH = 300.0  # seconds after which keys are fetched again: a provider takes back one that is lost
Algorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
_NO_TOKEN = "this is neither a key of this server nor a token (JWT)"
_FAMILY = {"RS": "RSA", "PS": "RSA", "ES": "EC", "Ed": "OKP"}  # kinds of keys, by how their algorithms begin


class TokenIssuer(BaseModel):
    """One provider that is trusted: a section of governance.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    issuer: Annotated[str, Field(min_length=1)]  # as tokens have it in `iss`
    audience: Annotated[str, Field(min_length=1)]  # one of those that they have in `aud`
    jwks: str  # its public keys: a file, or a URL (https; http on this machine alone)
    algorithms: Annotated[tuple[Algorithm, ...], Field(min_length=1)] = ("RS256", "ES256", "EdDSA", "PS256")
    tenant_claim: str = "tenant"
    role_claim: str = "role"
    roles: dict[str, Role] = Field(default_factory=lambda: {role.value: role for role in Role})  # by the claim's values
    leeway: Annotated[float, Field(ge=0, le=600)] = 60.0  # seconds that clocks may differ by
    keys_kept: Annotated[float, Field(ge=2 * _REFRESH)] = 86400.0  # seconds that keys hold while the provider is away

    @field_validator("jwks")
    @classmethod
    def _check_jwks(cls, given: str) -> str:
        url = urlsplit(given)
        if "://" not in given or url.scheme == "https":
            return given
        if url.scheme == "http" and url.hostname and is_loopback(url.hostname):
            return given
        raise ValueError(f"{given} is neither a file nor an https URL; http is for addresses of this machine alone")


@dataclass(frozen=True, kw_only=True, slots=True)
class Claims:
    """What a verified token says."""

    issuer: str
    subject: str
    tenant: str
    role: Role
    expires: float  # seconds since 1970; the leeway is not in it


@dataclass(frozen=True)
class _Key:
    """A public one, and how the provider wrote it."""

    public: Any = field(compare=False)
    given: Mapping[str, Any]

    def is_for(self, algorithm: str) -> bool:
        """By its kind, and what the provider says that it is for."""
        return self.given["kty"] == _FAMILY[algorithm[:2]] and self.given.get("alg", algorithm) == algorithm


class _Keys:
    """A provider's public keys, by their ids."""

    def __init__(self, issuer: TokenIssuer) -> None:
        self._issuer = issuer
        self._is_url = "://" in issuer.jwks
        self._keys: dict[str | None, _Key] = {}
        self._fetched: float | None = None  # on the monotonic clock: when the provider last answered
        self._tried: float | None = None
        self._fetching: asyncio.Task[None] | None = None
        self.version = 0  # of what was fetched

    async def key(self, kid: str | None) -> _Key:
        """Raises Unauthenticated where the provider has none of that id; Unavailable where nobody can know."""
        self._begin_where_due(self._find(kid) is None)
        if self._fetching is not None and self._find(kid) is None:
            await asyncio.shield(self._fetching)
        self.check()
        found = self._find(kid)
        if found is None:
            raise Unauthenticated("the token's key is not known; get a new token from the identity provider")
        return found

    def check(self) -> None:
        """Raises Unavailable where what was fetched is too old to be believed."""
        self._begin_where_due(False)
        if self._silence > self._issuer.keys_kept:
            raise Unavailable(f"the keys of {self._issuer.issuer} cannot be had now; try again", 5.0)

    @property
    def _silence(self) -> float:
        return time.monotonic() - self._fetched if self._fetched is not None else float("inf")

    def _find(self, kid: str | None) -> _Key | None:
        if kid is None and len(self._keys) == 1:
            return next(iter(self._keys.values()))
        return self._keys.get(kid)

    def _begin_where_due(self, missing: bool) -> None:
        """A fetch for a key that is not there, at most every 30 s; and one in the background from time to time."""
        since = time.monotonic() - self._tried if self._tried is not None else float("inf")
        if self._fetching is None and since >= _BETWEEN and (missing or self._silence >= _REFRESH):
            self._tried = time.monotonic()
            self._fetching = asyncio.create_task(self._fetch())

    async def _fetch(self) -> None:
        """What fails is logged, and what is known goes on."""
        try:
            content = await (self._ask() if self._is_url else asyncio.to_thread(self._read))
            fresh = _read_keys(content, self._issuer.algorithms)
            self.version += fresh != self._keys
            self._keys, self._fetched = fresh, time.monotonic()
        except (OSError, TimeoutError, aiohttp.ClientError, ValueError) as error:
            log.error("the keys of %s could not be had from %s: %r", self._issuer.issuer, self._issuer.jwks, error)
        finally:
            self._fetching = None

    async def _ask(self) -> bytes:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(_FETCH)) as session,
            session.get(self._issuer.jwks, allow_redirects=False) as answer,
        ):
            if answer.status != 200:
                raise ValueError(f"it answered {answer.status}")
            content = b""
            async for piece in answer.content.iter_chunked(1 << 16):
                content += piece
                if len(content) > _MOST_BYTES:
                    raise ValueError(f"it has more than {_MOST_BYTES} bytes")
            return content

    def _read(self) -> bytes:
        with Path(self._issuer.jwks).open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES} bytes")
        return content

    async def close(self) -> None:
        """Fetches no more."""
        if (fetching := self._fetching) is not None:
            fetching.cancel()
            await asyncio.wait({fetching})


def _read_keys(content: bytes, algorithms: Sequence[str]) -> dict[str | None, _Key]:
    """Those that verify signatures by one of the algorithms. Raises ValueError where there is none, or too many."""
    try:
        given = json.loads(content)["keys"]
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError("it is no set of keys: {'keys': [...]}") from error
    if not isinstance(given, list) or len(given) > _MOST_KEYS:
        raise ValueError(f"its keys are no list, or more than {_MOST_KEYS}")
    kinds = {_FAMILY[algorithm[:2]] for algorithm in algorithms}
    found: dict[str | None, _Key] = {}
    for one in given:
        if not isinstance(one, dict) or one.get("kty") not in kinds or one.get("use", "sig") != "sig":
            continue  # it encrypts, or is for others
        if "d" in one:
            log.error("a key of the set is a private one, which anybody may have read: it is left out")
            continue
        kid = one.get("kid")
        if kid is not None and not isinstance(kid, str):
            continue
        try:
            found[kid] = _Key(jwt.PyJWK(one).key, one)
        except (jwt.PyJWTError, ValueError, TypeError) as error:  # one of a kind that nobody knows hides no others
            log.warning("a key of the set cannot be read and is left out: %s", error)
    if not found:
        raise ValueError("none of its keys verifies signatures by an algorithm that is allowed")
    return found


class Tokens:
    """Verifies tokens of some providers. A token that was verified is known by its digest until it expires or its
    provider's keys change, so that its next call costs a hash."""

    def __init__(self, issuers: Sequence[TokenIssuer]) -> None:
        """Raises InvalidParameter for two of one name."""
        self._issuers = {one.issuer: (one, _Keys(one)) for one in issuers}
        if len(self._issuers) < len(issuers):
            raise InvalidParameter("two token issuers have the same name; give each its own section", "issuers")
        self._known: OrderedDict[bytes, tuple[Claims, int]] = OrderedDict()

    async def close(self) -> None:
        """Fetches no more keys."""
        for _, keys in self._issuers.values():
            await keys.close()

    async def verify(self, token: str) -> Claims:
        """Raises Unauthenticated, with what its sender may read; Unavailable where a provider's keys cannot be had."""
        if len(token) > _MOST_CHARACTERS:
            raise Unauthenticated(f"the token has more than {_MOST_CHARACTERS} characters")
        if not token.isascii():
            raise Unauthenticated(_NO_TOKEN)
        digest = hashlib.sha256(token.encode()).digest()
        if (known := self._known.get(digest)) is not None:
            claims, version = known
            issuer, keys = self._issuers[claims.issuer]
            keys.check()
            if claims.expires + issuer.leeway <= time.time():
                del self._known[digest]
                raise Unauthenticated("the token has expired; get a new one")
            if version == keys.version:
                self._known.move_to_end(digest)
                return claims
            del self._known[digest]
        claims, version = await self._verify(token)
        self._known[digest] = (claims, version)
        if len(self._known) > _MOST_KNOWN:
            self._known.popitem(last=False)
        return claims

    async def _verify(self, token: str) -> tuple[Claims, int]:
        try:
            header = jwt.get_unverified_header(token)
            named = jwt.decode(token, options={"verify_signature": False}).get("iss")
        except (jwt.PyJWTError, ValueError, RecursionError) as error:
            raise Unauthenticated(_NO_TOKEN) from error
        issuer, keys = self._issuers.get(named, (None, None)) if isinstance(named, str) else (None, None)
        if issuer is None or keys is None:
            raise Unauthenticated("the token's issuer is not one that this server trusts")
        algorithm, kid = header.get("alg"), header.get("kid")
        if algorithm not in issuer.algorithms:
            raise Unauthenticated(f"the token's algorithm is not one of {', '.join(issuer.algorithms)}")
        key = await keys.key(kid)
        version = keys.version
        if not key.is_for(algorithm):
            raise Unauthenticated("the token's key is not for its algorithm")
        return _claims(issuer, _decoded(token, key, algorithm, issuer)), version


def _decoded(token: str, key: _Key, algorithm: str, issuer: TokenIssuer) -> dict[str, Any]:
    """What it claims, once that is known to be the provider's. Nothing in its header leads to another key."""
    try:
        return jwt.decode(
            token,
            key.public,
            algorithms=[algorithm],
            issuer=issuer.issuer,
            audience=issuer.audience,
            leeway=issuer.leeway,
            options={"require": ["exp", "iss", "aud", "sub"]},
        )
    except jwt.ExpiredSignatureError as error:
        raise Unauthenticated("the token has expired; get a new one") from error
    except jwt.ImmatureSignatureError as error:
        raise Unauthenticated("the token is not valid yet") from error
    except jwt.InvalidAudienceError as error:
        raise Unauthenticated("the token is for another audience than this server") from error
    except jwt.MissingRequiredClaimError as error:
        raise Unauthenticated(f"the token has no claim {error.claim}") from error
    except jwt.InvalidSignatureError as error:
        raise Unauthenticated("the token's signature is not its issuer's") from error
    except (jwt.PyJWTError, ValueError, TypeError, OverflowError) as error:
        raise Unauthenticated("the token cannot be verified") from error


def _claims(issuer: TokenIssuer, found: Mapping[str, Any]) -> Claims:
    tenant, role = found.get(issuer.tenant_claim), found.get(issuer.role_claim)
    if not isinstance(tenant, str) or not tenant:
        raise Unauthenticated(f"the token names no tenant in its claim {issuer.tenant_claim}")
    if not isinstance(role, str) or role not in issuer.roles:
        raise Unauthenticated(f"the token's claim {issuer.role_claim} is no role that this server knows")
    if not found["sub"] or not found["sub"].isprintable():  # what is none, no database would take
        raise Unauthenticated("the token names no subject that can be written")
    if not isinstance(found["exp"], int | float) or found["exp"] > _LATEST:
        raise Unauthenticated("the token's claim exp is no time in seconds")
    return Claims(
        issuer=issuer.issuer,
        subject=found["sub"],
        tenant=tenant,
        role=issuer.roles[role],
        expires=float(found["exp"]),
    )
