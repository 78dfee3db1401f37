"""Governance at a gateway: knows who calls, and puts on record what was done for them."""

import logging
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quire_engine.errors import QuireError, ServerError, Unavailable

from quire_cluster.governance.administration import Administration
from quire_cluster.governance.budget import Budget
from quire_cluster.governance.callers import Caller
from quire_cluster.governance.chain import AuditLog
from quire_cluster.governance.checks.policies import Policies
from quire_cluster.governance.checks.policing import Judge, Policing
from quire_cluster.governance.config import Governance
from quire_cluster.governance.database import Database
from quire_cluster.governance.directory import Directory
from quire_cluster.governance.journal import Journal
from quire_cluster.governance.limits import Limiter
from quire_cluster.governance.records import Record, UsageDelta, canonical
from quire_cluster.governance.writer import Writer
from quire_cluster.policies.quota import Ask, Grants

log = logging.getLogger(__name__)


class Governor:
    """`open` before the first call, `close` after the last."""

    def __init__(self, governance: Governance, name: str, ask_model: Judge) -> None:
        """`name`: of the gateway, to the controller. `ask_model`: asks a deployment a question. Needs a running
        loop."""
        self.database = Database(governance.database)
        self.directory = Directory(self.database, governance)
        self.audit = AuditLog(self.database, governance.signing_key, governance.content_key)
        self.administration = Administration(self.database, self.audit)
        self.journal = Journal(governance.journal)
        kept = governance.audit
        self.writer = Writer(self.database, self.audit, self.journal, days=kept.days, content_days=kept.content_days)
        self._budget = Budget(self.database, self.writer)
        self._controller: Any = None
        rules = Policies.parse(governance.policies, Path()) if governance.policies else None
        self.policing = Policing(rules, ask_model) if rules is not None else None
        self.limiter = Limiter(
            f"{name}:{uuid.uuid4()}",
            self._lease,
            used=self._budget.used,
            revision=lambda: self.directory.revision,
        )

    async def open(self) -> None:
        """Reads who may call, if the database answers: else callers are told to come again, until it does."""
        try:
            await self.directory.look()
        except ServerError as error:
            log.error("%s; callers are refused until it does", error)

    def parts(self) -> dict[str, Coroutine[Any, Any, None]]:
        """What lasts as long as the gateway, by what it does."""
        return {
            "following tenants and keys": self.directory.follow(),
            "bringing records to the database": self.writer.run(),
            "following what tenants have used": self._budget.follow(),
            "leasing tenants' limits": self.limiter.run(),
        }

    def check(self) -> None:
        """Raises Unavailable where nothing more can go on record."""
        if not self.journal.healthy:
            raise Unavailable("requests cannot be put on record now; try again", 5.0)

    def follow(self, controller: Any) -> None:
        """From here on tenants' limits are leased from it."""
        self._controller = controller

    async def _lease(self, ask: Ask) -> Grants:
        if self._controller is None:
            raise Unavailable("no controller is there yet")
        granted: Grants = await self._controller.lease.remote(ask)
        return granted

    async def close(self) -> None:
        """Once what is on record here is in the database, if that answers in time; else the next gateway on this host
        brings it there."""
        await self.writer.finish()
        await self.directory.close()
        if self.policing is not None:
            await self.policing.close()
        await self.database.close()

    def ended(
        self, caller: Caller, used: UsageDelta, facts: Mapping[str, Any], content: Callable[[], Mapping[str, Any]]
    ) -> None:
        """A request has its end. On disk when this returns. `content`: its prompt and its answers, which are asked for
        where they are kept."""
        self._budget.add(caller.tenant.name, used.prompt_tokens + used.output_tokens)
        kept = self.audit.seal(canonical(content())) if self.audit.keeps_content else None
        self._note("request", caller, asdict(used) | dict(facts), used, kept)

    def refused(self, caller: Caller, facts: Mapping[str, Any], error: QuireError) -> None:
        """A request that never began."""
        self._note("refused", caller, dict(facts) | {"refused": type(error).__name__, "why": str(error)[:200]})

    def asked(self, caller: Caller, method: str, *, allowed: bool) -> None:
        """Somebody looks at what is kept here, or would do what it may not."""
        self._note("admin", caller, {"action": method} | ({} if allowed else {"refused": "Forbidden"}))

    def _note(
        self,
        kind: str,
        caller: Caller,
        body: dict[str, Any],
        usage: UsageDelta | None = None,
        content: bytes | None = None,
    ) -> None:
        told = {"role": caller.role.value, "address": caller.address, "forwarded_for": caller.forwarded_for}
        body |= {name: value for name, value in told.items() if value}
        tenant, now = caller.tenant.name, int(time.time())
        self.journal.append(
            Record(kind=kind, at=now, tenant=tenant, key=caller.key, body=body, usage=usage, content=content)
        )
