"""What administrators do: tenants and keys. Every change is on the audit log, in the transaction that makes it."""

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from quire_engine.errors import InvalidParameter
from sqlalchemy import insert, select, update

from quire_cluster.governance import tables
from quire_cluster.governance.callers import Role, Tenant, TenantConfig
from quire_cluster.governance.chain import AuditLog
from quire_cluster.governance.database import Connection, Database
from quire_cluster.governance.directory import KEY_BEGINS, PREFIX, tenant_of
from quire_cluster.governance.records import Record
from quire_cluster.keys import digest

_KINDS = {role.value: role for role in Role}


@dataclass(frozen=True, kw_only=True, slots=True)
class Actor:
    """Who does it, for the audit log."""

    key: str  # the id of a key, or operator:NAME for whoever may read the database's address
    tenant: str = ""
    address: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyFacts:
    """All that is known of a key. Times are seconds since 1970."""

    id: str
    tenant: str
    role: str
    models: tuple[str, ...]
    created_at: int
    expires_at: int | None = None
    revoked_at: int | None = None

    def state(self, now: float) -> str:
        """In a word."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= now else "good"


class Administration:
    """Changes to who may call. Gateways see them within seconds. Every method raises Unavailable where the database
    does not answer."""

    def __init__(self, database: Database, log: AuditLog) -> None:
        self._database = database
        self._log = log

    # ---- tenants --------------------------------------------------------------------------------------------------

    async def tenants(self) -> list[Tenant]:
        """By their names."""
        async with self._database.snapshot() as connection:
            known = tables.tenants
            rows = await connection.execute(select(known).where(known.c.removed_at.is_(None)).order_by(known.c.name))
            return [tenant_of(row) for row in rows]

    async def add_tenant(self, tenant: Tenant, actor: Actor) -> None:
        """Raises InvalidParameter where there is one of this name."""
        async with self._database.transaction() as connection:
            before = await self._find(connection, tenant.name)
            if before is not None and before.removed_at is None:
                raise InvalidParameter(f"there is a tenant {tenant.name}; `quire tenants set` changes it", "name")
            values = _row(tenant) | {"created_at": int(time.time()), "removed_at": None}
            if before is None:
                await connection.execute(insert(tables.tenants).values(values))
            else:
                await connection.execute(_of(tenant.name).values(values))
            await self._note(connection, actor, "tenant.add", {"made": _shown(tenant)})

    async def change_tenant(self, name: str, given: Mapping[str, Any], actor: Actor) -> Tenant:
        """What is given, values of TenantConfig, changes; gives what it is then. Raises InvalidParameter."""
        async with self._database.transaction() as connection:
            before = await self._tenant(connection, name)
            values = asdict(before.limits) | {
                "weight": before.weight,
                "models": ",".join(before.models),
                "cache_group": before.cache_group,
            }
            tenant = TenantConfig(**(values | dict(given))).tenant(name)
            await connection.execute(_of(name).values(_row(tenant)))
            await self._note(connection, actor, "tenant.change", {"before": _shown(before), "after": _shown(tenant)})
        return tenant

    async def remove_tenant(self, name: str, actor: Actor) -> None:
        """With all its keys. Its usage and its records stay. Raises InvalidParameter where there is none."""
        async with self._database.transaction() as connection:
            await self._tenant(connection, name)
            now = int(time.time())
            await connection.execute(_of(name).values(removed_at=now))
            keys = tables.keys
            live = update(keys).where(keys.c.tenant == name, keys.c.revoked_at.is_(None))
            await connection.execute(live.values(revoked_at=now))
            await self._note(connection, actor, "tenant.remove", {"removed": name})

    # ---- keys -----------------------------------------------------------------------------------------------------

    async def keys(self, tenant: str | None = None) -> list[KeyFacts]:
        """The oldest first; of one tenant, or of all."""
        query = select(tables.keys).order_by(tables.keys.c.created_at, tables.keys.c.id)
        if tenant is not None:
            query = query.where(tables.keys.c.tenant == tenant)
        async with self._database.snapshot() as connection:
            return [_facts(row) for row in await connection.execute(query)]

    async def create_key(
        self, tenant: str, actor: Actor, *, role: str = "user", models: Sequence[str] = ("*",), lives: int | None = None
    ) -> tuple[KeyFacts, str]:
        """A new key, which is nowhere else. `lives`: seconds until it expires. Raises InvalidParameter."""
        if role not in _KINDS:
            raise InvalidParameter(f"role is {role!r:.80}; it must be one of {', '.join(_KINDS)}", "role")
        if lives is not None and lives < 1:
            raise InvalidParameter("a key lives for a second at least", "expires")
        async with self._database.transaction() as connection:
            await self._tenant(connection, tenant)
            facts, key = await self._make_key(connection, int(time.time()), tenant, role, tuple(models), lives)
            await self._note(connection, actor, "key.create", {"made": asdict(facts)})
        return facts, key

    async def rotate_key(self, id_: str, actor: Actor, *, overlap: int) -> tuple[KeyFacts, str]:
        """A new key like this one, whose own ends in `overlap` seconds, and not later than it would have. Raises
        InvalidParameter for one that is good no more."""
        async with self._database.transaction() as connection:
            old, now = await self._key(connection, id_), int(time.time())
            if old.state(now) != "good":
                raise InvalidParameter(f"{id_} is {old.state(now)}; create a new key instead", "id")
            lives = None if old.expires_at is None else max(1, old.expires_at - old.created_at)
            facts, key = await self._make_key(connection, now, old.tenant, old.role, old.models, lives)
            ends = min(now + overlap, old.expires_at) if old.expires_at is not None else now + overlap
            await connection.execute(update(tables.keys).where(tables.keys.c.id == id_).values(expires_at=ends))
            body = {"rotated": id_, "expires_at": ends, "made": asdict(facts)}
            await self._note(connection, actor, "key.rotate", body)
        return facts, key

    async def revoke_key(self, id_: str, actor: Actor) -> None:
        """For good. Raises InvalidParameter for one that is unknown, or revoked already."""
        async with self._database.transaction() as connection:
            facts = await self._key(connection, id_)
            if facts.revoked_at is not None:
                raise InvalidParameter(f"{id_} is revoked already", "id")
            now = int(time.time())
            await connection.execute(update(tables.keys).where(tables.keys.c.id == id_).values(revoked_at=now))
            await self._note(connection, actor, "key.revoke", {"revoked": id_, "of": facts.tenant})

    async def _make_key(
        self, connection: Connection, now: int, tenant: str, role: str, models: tuple[str, ...], lives: int | None
    ) -> tuple[KeyFacts, str]:
        key = f"{KEY_BEGINS}{secrets.token_hex(4)}-{secrets.token_urlsafe(32)}"
        facts = KeyFacts(
            id=key[:PREFIX],
            tenant=tenant,
            role=role,
            models=models,
            created_at=now,
            expires_at=None if lives is None else now + lives,
        )
        values = asdict(facts) | {"models": json.dumps(models), "digest": digest(key)}
        await connection.execute(insert(tables.keys).values(values))
        return facts, key

    # ---- both -----------------------------------------------------------------------------------------------------

    async def _find(self, connection: Connection, name: str) -> Any:
        query = select(tables.tenants).where(tables.tenants.c.name == name).with_for_update()
        return (await connection.execute(query)).one_or_none()

    async def _tenant(self, connection: Connection, name: str) -> Tenant:
        row = await self._find(connection, name)
        if row is None or row.removed_at is not None:
            raise InvalidParameter(f"there is no tenant {name!r:.80}; `quire tenants list` shows all", "tenant")
        return tenant_of(row)

    async def _key(self, connection: Connection, id_: str) -> KeyFacts:
        query = select(tables.keys).where(tables.keys.c.id == id_[:PREFIX]).with_for_update()
        row = (await connection.execute(query)).one_or_none()
        if row is None or id_ != row.id:
            raise InvalidParameter(
                f"there is no key {id_[:PREFIX]!r}; give its id, as qk-1a2b3c4d: `quire keys list` shows all", "id"
            )
        return _facts(row)

    async def _note(self, connection: Connection, actor: Actor, what: str, body: dict[str, Any]) -> None:
        """On the audit log; and gateways are to look."""
        revision = tables.revision
        await connection.execute(update(revision).values(number=revision.c.number + 1))
        told = {"action": what, "address": actor.address} | body
        record = Record(kind="admin", at=int(time.time()), tenant=actor.tenant, key=actor.key, body=told)
        await self._log.append(connection, [record])


def _of(name: str) -> Any:
    return update(tables.tenants).where(tables.tenants.c.name == name)


def _row(tenant: Tenant) -> dict[str, Any]:
    values = {"name": tenant.name, "weight": tenant.weight, "models": json.dumps(tenant.models)}
    return values | {"cache_group": tenant.cache_group} | asdict(tenant.limits)


def _shown(tenant: Tenant) -> dict[str, Any]:
    shown = asdict(tenant)
    return shown | shown.pop("limits")


def _facts(row: Any) -> KeyFacts:
    return KeyFacts(
        id=row.id,
        tenant=row.tenant,
        role=row.role,
        models=tuple(json.loads(row.models)),
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
    )
