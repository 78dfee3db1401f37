"""Transactions whose task is cancelled at any moment."""

import asyncio
import sqlite3
from pathlib import Path

from quire_cluster.governance.database import Database
from sqlalchemy import text


def test_what_is_cancelled_leaves_nothing_locked(tmp_path: Path) -> None:
    """A client that hangs up, or a part of the gateway that ends, at 150 moments of a transaction."""
    path = tmp_path / "governance.db"

    async def work(database: Database) -> None:
        while True:
            async with database.transaction() as connection:
                await connection.execute(text("CREATE TABLE IF NOT EXISTS t (n INTEGER)"))
                await connection.execute(text("INSERT INTO t VALUES (1)"))

    async def run(moment: int) -> None:
        database = Database(f"sqlite:///{path}")
        tasks = [asyncio.ensure_future(work(database)) for _ in range(2)]
        await asyncio.sleep(0.01 + 0.0002 * moment)
        for task in tasks:
            task.cancel()
        await database.close()
        free(path)

    for moment in range(150):
        asyncio.run(run(moment))  # which ends


def free(path: Path) -> None:
    """Whether anyone may write at once."""
    connection = sqlite3.connect(path, timeout=0, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    connection.close()
