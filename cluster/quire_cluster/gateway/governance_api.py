"""The Governance service: what administrators and auditors ask, over gRPC and over HTTP as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from quire_engine.errors import InvalidParameter
from quire_protos.v1 import governance_pb2 as pb
from quire_protos.v1 import governance_pb2_grpc

from quire_cluster.gateway.json_calls import DESCRIBE
from quire_cluster.governance.administration import Actor, KeyFacts
from quire_cluster.governance.callers import Permission, Tenant, TenantConfig, TenantLimits, patterns
from quire_cluster.governance.chain import Checkpoint
from quire_cluster.governance.governor import Governor
from quire_cluster.governance.identity import calling
from quire_cluster.governance.usage import query

SERVICE = pb.DESCRIPTOR.services_by_name["Governance"]
_DAY = 86400
_LISTED = 100  # records, where nothing is said
_MOST_LISTED = 1000
_READ = {DESCRIBE, "ListTenants", "ListKeys", "GetUsage", "ListAudit", "VerifyAudit"}
_LIMITS = [f.name for f in fields(TenantLimits)]
_LIFTED = {*_LIMITS, "cache_group"}


class GovernanceService(governance_pb2_grpc.GovernanceServicer):
    """The calls. Every one is on record: those that change something with what it is."""

    def __init__(self, governor: Governor) -> None:
        self._governor = governor
        self._administration = governor.administration

    def check(self, method: str) -> None:
        """Whether the caller may. Raises Forbidden."""
        caller, reads = calling(), method in _READ
        permission = Permission.READ if reads else Permission.MANAGE
        allowed = caller.may(permission)
        if not allowed or (reads and method != DESCRIBE):
            self._governor.asked(caller, method, allowed=allowed)
        caller.check(permission)

    async def AddTenant(self, request: pb.Tenant, context: Any) -> pb.Tenant:
        """Under a new name."""
        tenant = TenantConfig(**_given(request)).tenant(request.name)
        await self._administration.add_tenant(tenant, _actor())
        return _tenant(tenant)

    async def SetTenant(self, request: pb.SetTenantRequest, context: Any) -> pb.Tenant:
        """What is given changes, and all else stays."""
        if unknown := set(request.lift) - _LIFTED:
            raise InvalidParameter(f"lift has {min(unknown)!r:.80}; there are: {', '.join(sorted(_LIFTED))}", "lift")
        given = _given(request.tenant) | dict.fromkeys(request.lift)
        return _tenant(await self._administration.change_tenant(request.tenant.name, given, _actor()))

    async def RemoveTenant(self, request: pb.RemoveTenantRequest, context: Any) -> pb.RemoveTenantResponse:
        """With its keys."""
        await self._administration.remove_tenant(request.name, _actor())
        return pb.RemoveTenantResponse()

    async def ListTenants(self, request: pb.ListTenantsRequest, context: Any) -> pb.ListTenantsResponse:
        """All of them."""
        return pb.ListTenantsResponse(tenants=map(_tenant, await self._administration.tenants()))

    async def CreateKey(self, request: pb.CreateKeyRequest, context: Any) -> pb.NewKey:
        """Shown this once."""
        facts, key = await self._administration.create_key(
            request.tenant,
            _actor(),
            role=request.role if request.HasField("role") else "user",
            models=_patterns(request.models),
            lives=request.lives_seconds if request.HasField("lives_seconds") else None,
        )
        return pb.NewKey(key=_key(facts), secret=key)

    async def RotateKey(self, request: pb.RotateKeyRequest, context: Any) -> pb.NewKey:
        """A new one in an old one's place."""
        overlap = request.overlap_seconds if request.HasField("overlap_seconds") else _DAY
        facts, key = await self._administration.rotate_key(request.id, _actor(), overlap=overlap)
        return pb.NewKey(key=_key(facts), secret=key)

    async def RevokeKey(self, request: pb.RevokeKeyRequest, context: Any) -> pb.RevokeKeyResponse:
        """For good."""
        await self._administration.revoke_key(request.id, _actor())
        return pb.RevokeKeyResponse()

    async def ListKeys(self, request: pb.ListKeysRequest, context: Any) -> pb.ListKeysResponse:
        """Without what they are."""
        return pb.ListKeysResponse(keys=map(_key, await self._administration.keys(request.tenant or None)))

    async def GetUsage(self, request: pb.GetUsageRequest, context: Any) -> pb.GetUsageResponse:
        """Of tenants, days, keys or models. What gateways have not written yet is not in it: a second's worth."""
        async with self._governor.database.snapshot() as connection:
            rows = await query(
                connection,
                tenant=request.tenant or None,
                key=request.key or None,
                model=request.model or None,
                since=request.since or None,
                until=request.until or None,
                by=request.by or "tenant",
            )
        return pb.GetUsageResponse(rows=[pb.UsageRow(**asdict(row)) for row in rows])

    async def ListAudit(self, request: pb.ListAuditRequest, context: Any) -> pb.ListAuditResponse:
        """The newest first."""
        limit = request.limit or _LISTED
        if limit > _MOST_LISTED:
            raise InvalidParameter(f"limit is {limit}; at most {_MOST_LISTED} records are listed at once", "limit")
        found = await self._governor.audit.list(
            tenant=request.tenant or None, kind=request.kind or None, before=request.before or None, limit=limit
        )
        records = [
            pb.AuditRecord(seq=one.seq, hash=one.hash, body=one.body.decode("utf-8", "replace")) for one in found
        ]
        return pb.ListAuditResponse(records=records)

    async def VerifyAudit(self, request: pb.VerifyAuditRequest, context: Any) -> pb.VerifyAuditResponse:
        """All of it."""
        known = Checkpoint.from_line(request.checkpoint) if request.checkpoint else None
        report = await self._governor.audit.verify(known=known)
        return pb.VerifyAuditResponse(
            intact=report.fault is None,
            fault=report.fault or "",
            records=report.records,
            first=report.end.first if report.end is not None else 0,
            last=report.end.seq if report.end is not None else 0,
            checkpoint=report.end.to_line() if report.end is not None else "",
        )


def _actor() -> Actor:
    caller = calling()
    return Actor(key=caller.key, tenant=caller.tenant.name, address=caller.address)


def _given(message: pb.Tenant) -> dict[str, Any]:
    """Values of TenantConfig that a message has."""
    names = ["weight", "cache_group", *_LIMITS]
    given = {name: getattr(message, name) for name in names if message.HasField(name)}
    if message.models:
        given["models"] = ",".join(message.models)
    return given


def _patterns(given: Sequence[str]) -> tuple[str, ...]:
    return patterns(",".join(given)) if given else ("*",)


def _tenant(tenant: Tenant) -> pb.Tenant:
    limits = {name: value for name, value in asdict(tenant.limits).items() if value is not None}
    made = pb.Tenant(name=tenant.name, weight=tenant.weight, models=tenant.models, **limits)
    if tenant.cache_group is not None:
        made.cache_group = tenant.cache_group
    return made


def _key(facts: KeyFacts) -> pb.Key:
    return pb.Key(**{name: value for name, value in asdict(facts).items() if value is not None})
