"""The tenants and keys that a gateway knows: a copy of the database's, followed once a second."""

import asyncio
import hmac
import json
import logging
import time
from dataclasses import dataclass, replace

from quire_engine.errors import Unauthenticated, Unavailable
from sqlalchemy import Row, select

from quire_cluster.governance import tables
from quire_cluster.governance.callers import Caller, Role, Tenant, TenantLimits
from quire_cluster.governance.config import Governance
from quire_cluster.governance.database import Database
from quire_cluster.governance.identity import Credentials
from quire_cluster.governance.tokens import Tokens
from quire_cluster.keys import digest

log = logging.getLogger(__name__)
_LOOK = 2.0  # seconds between two looks at the database, each of which costs some milliseconds
KEY_BEGINS = "qk-"
PREFIX = 11  # characters of a key that are its id: qk-1a2b3c4d of qk-1a2b3c4d-...
_NOBODY = bytes(32)
_LONGEST_NAME = 255  # characters of what a caller is known by


@dataclass(frozen=True, slots=True)
class _Key:
    digest: bytes
    caller: Caller
    expires_at: int | None
    revoked_at: int | None


class Directory:
    """`follow` keeps it up to date. While the database is away what was read last holds, for `grace` seconds."""

    def __init__(self, database: Database, governance: Governance) -> None:
        """Needs a running loop where there are identity providers."""
        self._database = database
        self._grace = governance.grace
        self._tokens = Tokens(governance.issuers) if governance.issuers else None
        self._clients = {client.name: client for client in governance.clients}
        self._keys: dict[str, _Key] = {}
        self.revision = 0  # of what is known: it grows
        self._heard: float | None = None  # on the monotonic clock: when the database last answered
        self.tenants: dict[str, Tenant] = {}

    @property
    def silence(self) -> float:
        """Seconds since the database last answered; infinite where it never has."""
        return time.monotonic() - self._heard if self._heard is not None else float("inf")

    async def close(self) -> None:
        """Fetches no keys of identity providers any more."""
        if self._tokens is not None:
            await self._tokens.close()

    async def follow(self) -> None:
        """For ever."""
        while True:
            try:
                await self.look()
            except Unavailable as error:
                log.error("%s; what was read %.0f s ago holds for %.0f s", error, self.silence, self._grace)
            await asyncio.sleep(_LOOK)

    async def look(self) -> None:
        """Reads what has changed. Raises Unavailable."""
        async with self._database.snapshot() as connection:
            number = (await connection.execute(select(tables.revision.c.number))).scalar_one()
            if number != self.revision:
                tenants = (await connection.execute(select(tables.tenants))).all()
                keys = (await connection.execute(select(tables.keys))).all()
                self.tenants = {row.name: tenant_of(row) for row in tenants if row.removed_at is None}
                self._keys = {
                    row.id: _key_of(row, self.tenants[row.tenant]) for row in keys if row.tenant in self.tenants
                }
                self.revision = number
        self._heard = time.monotonic()

    async def caller(self, given: Credentials) -> Caller:
        """By its key, its provider's token, or its certificate. Raises Unauthenticated; Unavailable where the database
        is away for too long."""
        if self.silence > self._grace:
            raise Unavailable("who may call cannot be looked up now; try again", 5.0)
        if not given.key:
            found = self._of_certificate(given.certificate)
        elif self._tokens is not None and not given.key.startswith(KEY_BEGINS):
            found = await self._of_token(self._tokens, given.key)
        else:
            found = self._of_key(given)
        return replace(found, address=given.address, forwarded_for=given.forwarded_for)

    def _of_certificate(self, name: str) -> Caller:
        client = self._clients.get(name)
        if not name or client is None:
            other = f"; the certificate's name, {name!r:.200}, is not among `clients`" if name else ""
            raise Unauthenticated(f"send a key as 'Authorization: Bearer KEY' or 'x-api-key: KEY'{other}")
        return Caller(tenant=self._tenant(client.tenant), role=client.role, key=f"certificate:{name}"[:_LONGEST_NAME])

    async def _of_token(self, tokens: Tokens, token: str) -> Caller:
        claims = await tokens.verify(token)
        name = f"subject:{claims.subject}"[:_LONGEST_NAME]
        return Caller(tenant=self._tenant(claims.tenant), role=claims.role, key=name)

    def _tenant(self, name: str) -> Tenant:
        tenant = self.tenants.get(name)
        if tenant is None:
            raise Unauthenticated(f"there is no tenant {name!r:.80} here; ask your administrator to make it one")
        return tenant

    def _of_key(self, given: Credentials) -> Caller:
        key = self._keys.get(given.key[:PREFIX])
        good = hmac.compare_digest(digest(given.key), key.digest if key is not None else _NOBODY)
        if key is None or not good:
            raise Unauthenticated("this key is unknown; ask your administrator for one")
        if key.revoked_at is not None:
            raise Unauthenticated("this key was revoked; ask your administrator for another one")
        if key.expires_at is not None and key.expires_at <= time.time():
            raise Unauthenticated("this key has expired; ask your administrator for another one")
        return key.caller


def tenant_of(row: "Row[tuple[object, ...]]") -> Tenant:
    """Of a row of the table."""
    return Tenant(
        name=row.name,
        weight=row.weight,
        models=tuple(json.loads(row.models)),
        cache_group=row.cache_group,
        limits=TenantLimits(
            requests_per_minute=row.requests_per_minute,
            tokens_per_minute=row.tokens_per_minute,
            concurrent_requests=row.concurrent_requests,
            longest_prompt=row.longest_prompt,
            longest_answer=row.longest_answer,
            monthly_tokens=row.monthly_tokens,
        ),
    )


def _key_of(row: "Row[tuple[object, ...]]", tenant: Tenant) -> _Key:
    caller = Caller(tenant=tenant, role=Role(row.role), key=row.id, models=tuple(json.loads(row.models)))
    return _Key(row.digest, caller, row.expires_at, row.revoked_at)
