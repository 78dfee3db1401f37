"""Brings what journals hold into the database: each record once, whatever dies when."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from quire_engine.errors import Unavailable
from sqlalchemy import delete, select

from quire_cluster.governance import tables, usage
from quire_cluster.governance.chain import AuditLog
from quire_cluster.governance.database import Connection, Database
from quire_cluster.governance.journal import Journal, orphans, read, set_aside
from quire_cluster.governance.records import Record

log = logging.getLogger(__name__)
_PAUSE = 0.1  # seconds between two batches
_SHARE = 1 << 20  # bytes of a journal that make a batch
_LARGE = 16 << 20  # bytes of a journal that is followed by a new one
_ORPHANS = 10.0  # seconds between two looks for them
_FLUSH = 10.0  # seconds that records get on their way to the database at the end
_LONGEST_PAUSE = 5.0  # seconds, while the database is away
_RETIRE = 3600.0  # seconds between two looks for what is past its retention


class Writer:
    """`run` for ever. How far a journal is in the database stands there, and moves in the transaction that brings its
    records."""

    def __init__(
        self, database: Database, audit: AuditLog, journal: Journal, *, days: int | None = None, content_days: int = 30
    ) -> None:
        """`days`, `content_days`: how long records and their content are kept; None: for ever."""
        self._database = database
        self._audit = audit
        self._journal = journal
        self._retention = (days, content_days)
        self._position = 0  # of this journal, in the database
        self._written = 0  # records of this journal that are there
        self._working = asyncio.Lock()
        self.away_since: float | None = None  # on the monotonic clock: since when nothing gets there

    @property
    def pending(self) -> int:
        """Records of this gateway that are not in the database."""
        return self._journal.appended - self._written

    async def run(self) -> None:
        """Until it is cancelled."""
        pause, looked, retired = _PAUSE, -_ORPHANS, -_RETIRE
        while True:
            now = time.monotonic()
            parts: list[Callable[[], Awaitable[None]]] = [self._drain]
            if now - looked >= _ORPHANS:
                parts.append(self.collect)
            if now - retired >= _RETIRE:
                parts.append(self._retire)
            if await self._tried(parts):
                looked = now if self.collect in parts else looked
                retired = now if self._retire in parts else retired
                pause = _PAUSE
            else:
                pause = min(2 * pause, _LONGEST_PAUSE)
            await asyncio.sleep(pause)

    async def flush(self) -> None:
        """Returns when all that was appended before is in the database."""
        until = self._journal.appended
        while self._written < until:
            if not await self._tried([self._drain]) or self._written < until:
                await asyncio.sleep(_PAUSE)

    async def finish(self) -> None:
        """The same, if it can be had in time: else others bring it there."""
        try:
            await asyncio.wait_for(self.flush(), _FLUSH)
        except TimeoutError:
            log.warning("%d records are still in %s", self.pending, self._journal.folder)

    async def _tried(self, parts: "list[Callable[[], Awaitable[None]]]") -> bool:
        """Whether they succeeded. Whatever it is that fails, records wait in their journal, and it is tried again."""
        try:
            for part in parts:
                await part()
        except Exception as error:
            if self.away_since is None:
                self.away_since = time.monotonic()
                known = isinstance(error, Unavailable)
                log.error(
                    "%d records wait in %s: %s",
                    self.pending,
                    self._journal.folder,
                    error,
                    exc_info=None if known else error,
                )
            return False
        self.away_since = None
        return True

    async def _drain(self) -> None:
        """This journal, as far as it goes."""
        if not (self.pending or self._journal.deleted or self._position >= _LARGE):
            return
        self._journal.write()
        async with self._working:
            name, path = self._journal.id, self._journal.opened
            while True:
                position = self._position
                records, end = await asyncio.to_thread(read, path, position, _SHARE)
                if not records:
                    break
                self._position = await self._bring(self._journal.id, records, position, end)
                if self._position == end:
                    self._written += len(records)
                else:  # an answer of the database was lost, or it is an older state of it that answers now
                    self._written += await asyncio.to_thread(_between, path, position, self._position)
            deleted = self._journal.deleted
            whole = self._journal.healthy and self._position == path.stat().st_size
            if whole and (deleted or self._position >= _LARGE):
                if deleted:
                    log.error("%s was deleted by somebody; the journal goes on in another file", self._journal.path)
                self._journal.renew()
                self._position = 0 if self._journal.id != name else self._position

    async def collect(self) -> None:
        """Journals of gateways on this host that are no more. One that fails is no other one's matter."""
        for path in orphans(self._journal.folder):
            log.info("%s is an orphan, and is brought to the database", path)
            try:
                await self._adopt(path)
            except OSError as error:
                log.error("%s stays: %s", path, error)

    async def _adopt(self, path: Path) -> None:
        name = path.stem
        async with self._database.transaction() as connection:
            position = await self._place(connection, name)
        while True:
            records, end = await asyncio.to_thread(read, path, position, _SHARE)
            if not records:
                break
            position = await self._bring(name, records, position, end)
        if (rest := path.stat().st_size - position) > 0:
            torn = set_aside(path)
            log.error("the last %d bytes of %s are no whole records: it is %s now", rest, path, torn.name)
            return
        path.unlink()
        async with self._database.transaction() as connection:
            await connection.execute(delete(tables.journals).where(tables.journals.c.id == name))

    async def _bring(self, name: str, records: list[Record], position: int, end: int) -> int:
        """How far the journal is there then: it may have been brought there before, and the answer was lost."""
        async with self._database.transaction() as connection:
            await self._audit.lock(connection)
            known = await self._place(connection, name)
            if known != position:
                return known
            await self._audit.append(connection, records)
            await usage.add(self._database, connection, records)
            putting = self._database.insert(tables.journals)
            moved = {"position": end, "updated_at": int(time.time())}
            await connection.execute(
                putting.on_conflict_do_update(index_elements=["id"], set_=moved), {"id": name} | moved
            )
        return end

    async def _place(self, connection: Connection, name: str) -> int:
        table = tables.journals
        found = await connection.execute(select(table.c.position).where(table.c.id == name))
        return found.scalar_one_or_none() or 0

    async def _retire(self) -> None:
        days, content_days = self._retention
        more = True
        while more:
            async with self._database.transaction() as connection:
                now = int(time.time())
                more = await self._audit.retire(connection, now, days=days, content_days=content_days)


def _between(path: Path, begin: int, end: int) -> int:
    """Records between two places in a file; below nought where the second comes first."""
    low, high = sorted((begin, end))
    count = len(read(path, low, high - low)[0])
    return count if begin <= end else -count
