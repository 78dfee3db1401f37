"""What operators ask of a cluster, on the audit log: which models were served, and who made it so."""

import time
from typing import Any

from quire_engine.errors import Unavailable

from quire_cluster.governance.chain import AuditLog
from quire_cluster.governance.config import Governance
from quire_cluster.governance.database import Database
from quire_cluster.governance.identity import calling
from quire_cluster.governance.journal import Journal
from quire_cluster.governance.records import Record
from quire_cluster.governance.writer import Writer


class OperatorLog:
    """A controller's. `run` lasts as long as that."""

    def __init__(self, governance: Governance) -> None:
        """Raises InvalidParameter where there can be no journal."""
        self._database = Database(governance.database)
        self._journal = Journal(governance.journal)
        audit, kept = AuditLog(self._database, governance.signing_key), governance.audit
        self._writer = Writer(self._database, audit, self._journal, days=kept.days, content_days=kept.content_days)

    async def run(self) -> None:
        """For ever."""
        await self._writer.run()

    def note(self, action: str, asked: dict[str, Any]) -> None:
        """Before it is done. On disk when this returns. Raises Unavailable."""
        body = {"action": action, "asked": asked, "address": calling().address}
        self._journal.append(Record(kind="admin", at=int(time.time()), tenant="", key="operator", body=body))
        if not self._journal.healthy:
            raise Unavailable("what operators do cannot be put on record now; make room on the head's disk", 5.0)

    async def close(self) -> None:
        """Once it is in the database, if that answers in time; else a gateway on the head brings it there."""
        await self._writer.finish()
        self._journal.close()
        await self._database.close()
