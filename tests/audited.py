"""Audit logs for tests: records, and a log in a database."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from quire_cluster.governance import tables
from quire_cluster.governance.chain import AuditLog
from quire_cluster.governance.database import Database
from quire_cluster.governance.records import Record, UsageDelta
from sqlalchemy import select

PEM = Ed25519PrivateKey.from_private_bytes(b"s" * 32).private_bytes(
    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
)
CONTENT_KEY = b"c" * 32
START = 1_790_000_000  # seconds


def record(number: int, **changes: Any) -> Record:
    used = UsageDelta(model="m", prompt_tokens=number, cached_tokens=1, output_tokens=2)
    made = Record(kind="request", at=START + number, tenant=f"t{number % 3}", key="k", body={"n": number}, usage=used)
    return replace(made, **changes)


def run(url: str, work: Callable[[Database, AuditLog], Coroutine[Any, Any, Any]]) -> Any:
    """With the database and its log."""

    async def running() -> Any:
        database = Database(url)
        try:
            await database.migrate()
            return await work(database, AuditLog(database, PEM, CONTENT_KEY))
        finally:
            await database.close()

    return asyncio.run(running())


async def append(database: Database, log: AuditLog, *records: Record) -> None:
    async with database.transaction() as connection:
        await log.append(connection, records)


async def exported(log: AuditLog) -> list[str]:
    return [line async for line in log.export()]


async def rows(database: Database, table: Any) -> Any:
    async with database.snapshot() as connection:
        return (await connection.execute(select(table))).all()


async def numbers(database: Database) -> Counter[int]:
    return Counter(json.loads(row.body)["n"] for row in await rows(database, tables.audit))
