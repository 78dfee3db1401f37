"""Who calls: tenants, roles, and what each may do."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from fnmatch import fnmatchcase

from quire_engine.errors import Forbidden


class Role(Enum):
    """Of a caller. What each may do stands in `_MAY`."""

    USER = "user"
    AUDITOR = "auditor"
    ADMIN = "admin"


class Permission(Enum):
    """What a call needs."""

    USE = "use models"
    READ = "read metrics, usage and the audit log"
    MANAGE = "manage tenants and keys"


_MAY = {
    Role.USER: {Permission.USE},
    Role.AUDITOR: {Permission.READ},
    Role.ADMIN: {Permission.USE, Permission.READ, Permission.MANAGE},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantLimits:
    """None: without limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # of prompts and answers together
    concurrent_requests: int | None = None
    longest_prompt: int | None = None  # tokens
    longest_answer: int | None = None  # tokens
    monthly_tokens: int | None = None  # of prompts and answers together, in a month of UTC


@dataclass(frozen=True, kw_only=True, slots=True)
class Tenant:
    """A group of callers that is served, limited and billed as one. `name` "": the only one, of a server that knows
    none."""

    name: str
    weight: float = 1.0  # of its share, where several want more than there is
    models: tuple[str, ...] = ("*",)  # patterns of names that it may use
    cache_group: str | None = None  # tenants of one group share what was computed; None: with nobody
    limits: TenantLimits = TenantLimits()

    def salt(self, given: str | None) -> bytes:
        """Under which prompts of this tenant are cached (32 bytes; empty where nothing separates): no other tenant
        finds them, whatever salt it sends. `given`: the request's own."""
        if not self.name:
            return hashlib.sha256(given.encode()).digest() if given else b""
        whose = ["group", self.cache_group] if self.cache_group is not None else ["tenant", self.name]
        return hashlib.sha256(json.dumps([*whose, given or ""]).encode()).digest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Whoever sent a call."""

    tenant: Tenant
    role: Role
    key: str = ""  # the id of its key, or another name that it is known by; never the key itself
    models: tuple[str, ...] = ("*",)  # patterns that its key is for, besides its tenant's
    address: str = field(default="", compare=False)  # where the call came from
    forwarded_for: str = field(default="", compare=False)  # whom a proxy says that it came from

    def may(self, permission: Permission) -> bool:
        """By its role."""
        return permission in _MAY[self.role]

    def check(self, permission: Permission) -> None:
        """Raises Forbidden where its role does not allow it."""
        if not self.may(permission):
            raise Forbidden(f"a key of the role {self.role.value} may not {permission.value}; use another one")

    def may_use(self, names: Iterable[str]) -> bool:
        """Whether a model of these names is for it, by its tenant's patterns and its key's."""
        known = tuple(names)
        return all(any(fnmatchcase(n, p) for n in known for p in few) for few in (self.tenant.models, self.models))


ANYONE = Caller(tenant=Tenant(name=""), role=Role.ADMIN)  # of a server without governance
