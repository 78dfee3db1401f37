"""The governance database: SQLite in a file (WAL), or a PostgreSQL server."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import alembic.command
import alembic.config
from quire_engine.errors import InvalidParameter, Unavailable
from sqlalchemy import Connection as SyncConnection
from sqlalchemy import CursorResult, event, make_url
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import NullPool

_DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg"}
_MIGRATIONS = Path(__file__).parent / "migrations"
_BUSY = 10.0  # seconds that another process may hold SQLite's file
_CALL = 10.0  # seconds that PostgreSQL may take to answer
# With SQLite's write lock from the start: two that read first and write then could only fail.
_WRITES: dict[str, Any] = {"sqlite_begin": "BEGIN IMMEDIATE"}
_LOCK = 0x51756972  # of PostgreSQL's advisory locks: one process migrates at a time
T = TypeVar("T")


class Connection:
    """In one transaction. A statement goes on to its end, whoever is cancelled meanwhile: one that is cut off keeps its
    locks, for SQLite closes no connection that has one."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def execute(self, statement: Any, parameters: Any = None) -> CursorResult[*tuple[Any, ...]]:
        """As SQLAlchemy's."""
        return await _whole(self._connection.execute(statement, parameters))

    async def run_sync(self, function: Callable[[SyncConnection], T]) -> T:
        """As SQLAlchemy's."""
        return await _whole(self._connection.run_sync(function))


class Database:
    """Connections, each for one transaction. Every failure of the database itself is Unavailable: it may be back."""

    def __init__(self, url: str) -> None:
        """`url`: sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME, with or without its driver's name. Raises
        InvalidParameter."""
        try:
            parsed = make_url(url)
        except ArgumentError as error:
            raise InvalidParameter(_mend("it is no address of a database"), "database") from error
        kind = parsed.get_backend_name()
        if kind not in _DRIVERS or parsed.drivername not in (kind, _DRIVERS[kind]):
            raise InvalidParameter(_mend(f"{parsed.drivername} is not supported"), "database")
        self.embedded = kind == "sqlite"
        if self.embedded and not parsed.database:
            raise InvalidParameter(_mend("SQLite needs a file"), "database")
        self.file = Path(parsed.database) if self.embedded and parsed.database else None  # SQLite's
        self._of_reads = "SERIALIZABLE" if self.embedded else "REPEATABLE READ"
        self.insert = sqlite.insert if self.embedded else postgresql.insert  # both know ON CONFLICT
        options: dict[str, Any] = {"timeout": _BUSY} if self.embedded else {"timeout": _CALL, "command_timeout": _CALL}
        # A connection that is kept would go on with SQLite's file after somebody has deleted or replaced it.
        pool: dict[str, Any] = {"poolclass": NullPool} if self.embedded else {"pool_pre_ping": True}
        self._engine = create_async_engine(parsed.set(drivername=_DRIVERS[kind]), connect_args=options, **pool)
        self._open = 0  # connections
        self._none_open = asyncio.Event()
        if self.embedded:
            event.listen(self._engine.sync_engine, "connect", _prepare)
            event.listen(self._engine.sync_engine, "begin", _begin)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """Committed at the end, undone where anything is raised. On SQLite only one at a time goes on, over all
        processes; elsewhere take locks (`with_for_update`). Raises Unavailable where the database cannot be reached."""
        async with self._begun(_WRITES) as connection:
            yield connection

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[Connection]:
        """To read alone, from what is there at the first read; nobody waits for it. Raises as `transaction` does."""
        async with self._begun({"sqlite_begin": "BEGIN", "isolation_level": self._of_reads}) as connection:
            yield connection

    @asynccontextmanager
    async def _begun(self, options: dict[str, Any]) -> AsyncIterator[Connection]:
        connection = self._engine.connect()
        self._open += 1
        self._none_open.clear()
        try:
            try:
                await _whole(_begin_with(connection, options))
                yield Connection(connection)
                await _whole(connection.commit())
            finally:
                if connection.sync_connection is not None:  # it was reached
                    await _whole(connection.close())
        except (OSError, TimeoutError, SQLAlchemyError) as error:
            if isinstance(error, SQLAlchemyError) and not isinstance(error, DBAPIError):
                raise  # a bug of ours
            why = str(error.orig if isinstance(error, DBAPIError) else error) or type(error).__name__
            raise Unavailable(f"the governance database does not answer: {why}") from error
        finally:
            self._open -= 1
            if not self._open:
                self._none_open.set()

    async def migrate(self) -> None:
        """Makes its tables what this version of Quire needs. Raises Unavailable; InvalidParameter for a database of a
        later version."""
        if self.file is not None and not self.file.exists():
            with contextlib.suppress(OSError):  # it is said when it is opened
                os.close(os.open(self.file, os.O_WRONLY | os.O_CREAT, 0o600))
        async with self.transaction() as connection:
            await connection.run_sync(self._upgrade)

    def _upgrade(self, connection: SyncConnection) -> None:
        if not self.embedded:
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
        config = alembic.config.Config()
        config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
        config.attributes["connection"] = connection
        try:
            alembic.command.upgrade(config, "head")
        except alembic.util.CommandError as error:
            raise InvalidParameter(
                f"the governance database is of another version of Quire ({error}); run that one, or give another "
                "database",
                "database",
            ) from error

    async def close(self) -> None:
        """Its connections, once nobody uses them: what was cancelled ends first, if it does so in time."""
        if self._open:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_BUSY + _CALL):
                    await self._none_open.wait()
        await self._engine.dispose()


def _prepare(connection: Any, record: object) -> None:
    """Of SQLite. Readers and the one writer do not wait for each other (WAL); what is committed survives the machine's
    fall (FULL). Transactions are begun by `_begin`, not by Python's driver."""
    connection.isolation_level = None
    cursor = connection.cursor()
    for setting in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {setting}")
    cursor.close()


async def _whole(work: Coroutine[Any, Any, T]) -> T:
    """Raises CancelledError only once the work is done."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    finally:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([task])


async def _begin_with(connection: AsyncConnection, options: dict[str, Any]) -> None:
    await connection.start()
    await connection.execution_options(**options)
    await connection.begin()


def _begin(connection: SyncConnection) -> None:
    connection.exec_driver_sql(connection.get_execution_options()["sqlite_begin"])


def _mend(why: str) -> str:
    return f"database: {why}; give sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME"
