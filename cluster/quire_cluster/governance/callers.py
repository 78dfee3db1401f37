"""Who calls: tenants, roles, and what each may do."""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from enum import Enum
from fnmatch import fnmatchcase

from quire_engine.config import check, option
from quire_engine.errors import Forbidden, InvalidParameter

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_PATTERNS = 100


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


@dataclass(frozen=True, kw_only=True)
class TenantLimits:
    """What a tenant may have."""

    requests_per_minute: int | None = option(None, "that it may begin", form="requests", least=1, unset="no limit")
    tokens_per_minute: int | None = option(
        None, "of prompts and answers together", form="tokens", least=1, unset="no limit"
    )
    concurrent_requests: int | None = option(None, "at a time", form="requests", least=1, unset="no limit")
    longest_prompt: int | None = option(None, "of a prompt", form="tokens", least=1, unset="the model's context")
    longest_answer: int | None = option(None, "of an answer", form="tokens", least=1, unset="the model's context")
    monthly_tokens: int | None = option(
        None, "of prompts and answers together, in a month of UTC", form="tokens", least=1, unset="no limit"
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class TenantConfig(TenantLimits):
    """A tenant, as operators say what it is."""

    weight: float = option(
        1.0, "of its share, where tenants want more than there is", least=0.001, most=1000, form="parts"
    )
    models: str = option("*", "that it may use", form="patterns of models' names (separated by commas)")
    cache_group: str | None = option(
        None, "of tenants that share a prefix cache; none: it shares with nobody", form="a name", unset="none"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        patterns(self.models)
        if self.cache_group is not None:
            check_name(self.cache_group, "cache_group")

    def tenant(self, name: str) -> "Tenant":
        """Of that name. Raises InvalidParameter for what is none."""
        check_name(name, "name")
        limits = TenantLimits(**{f.name: getattr(self, f.name) for f in fields(TenantLimits)})
        return Tenant(
            name=name,
            weight=float(self.weight),
            models=patterns(self.models),
            cache_group=None if self.cache_group == "none" else self.cache_group,
            limits=limits,
        )


def check_name(name: str, parameter: str) -> None:
    """Raises InvalidParameter for what is no name of a tenant or a group."""
    if not _NAME.fullmatch(name):
        raise InvalidParameter(
            f"{parameter} is {name!r:.80}; give at most 64 letters, digits, dots, hyphens and underscores, as team-a",
            parameter,
        )


def patterns(text: str) -> tuple[str, ...]:
    """Of models' names, out of a list with commas. Raises InvalidParameter."""
    found = tuple(entry.strip() for entry in text.split(","))
    if not all(found) or len(found) > _PATTERNS or len(text) > _PATTERNS * 100:
        raise InvalidParameter(
            f"models is {text!r:.80}; give from 1 to {_PATTERNS} patterns of names, as 'qwen3-*,llama-8b'", "models"
        )
    return found


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
