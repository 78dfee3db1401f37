"""Usage: tokens by day, tenant, key and model."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

from quire_engine.errors import InvalidParameter
from sqlalchemy import func, select

from quire_cluster.governance import tables
from quire_cluster.governance.database import Connection, Database
from quire_cluster.governance.records import Record

BY = ("tenant", "day", "key", "model")
_DAY = 86400  # seconds
_COUNTS = ("requests", "prompt_tokens", "cached_tokens", "output_tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class UsageRow:
    """Of one tenant, day, key or model."""

    of: str
    requests: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


async def query(
    connection: Connection,
    *,
    tenant: str | None = None,
    key: str | None = None,
    model: str | None = None,
    since: str | None = None,
    until: str | None = None,
    by: str = "tenant",
) -> list[UsageRow]:
    """In the order of what it is by. Days are as 2026-11-29, in UTC, both included. Raises InvalidParameter."""
    if by not in BY:
        raise InvalidParameter(f"by is {by!r:.80}; it must be one of {', '.join(BY)}", "by")
    table = tables.usage
    of = table.c[by]
    sums = [func.sum(table.c[name]).label(name) for name in _COUNTS]
    asked = select(of.label("of"), *sums).group_by(of).order_by(of)
    for name, value in (("tenant", tenant), ("key", key), ("model", model)):
        if value is not None:
            asked = asked.where(table.c[name] == value)
    if since is not None:
        asked = asked.where(table.c.day >= _day(since, "since"))
    if until is not None:
        asked = asked.where(table.c.day <= _day(until, "until"))
    return [
        UsageRow(of=row.of, **{name: int(getattr(row, name)) for name in _COUNTS})
        for row in await connection.execute(asked)
    ]


async def month_tokens(connection: Connection, now: float) -> dict[str, int]:
    """By tenant: tokens of prompts and answers in the month, in UTC, of that time."""
    table = tables.usage
    month = datetime.fromtimestamp(now, UTC).strftime("%Y-%m")
    total = func.sum(table.c.prompt_tokens + table.c.output_tokens)
    of_it = table.c.day.between(f"{month}-01", f"{month}-31")
    rows = await connection.execute(select(table.c.tenant, total).where(of_it).group_by(table.c.tenant))
    return {tenant: int(tokens) for tenant, tokens in rows}


async def add(database: Database, connection: Connection, records: Sequence[Record]) -> None:
    """What these records add, in as few rows as there are."""
    sums: dict[tuple[int, str, str, str], Counter[str]] = {}
    for record in records:
        if (used := record.usage) is None:
            continue
        found = sums.setdefault((record.at // _DAY, record.tenant, record.key, used.model), Counter())
        found["requests"] += 1
        for name in _COUNTS[1:]:
            found[name] += getattr(used, name)
    if not sums:
        return
    table = tables.usage
    names = ("day", "tenant", "key", "model")
    rows: dict[tuple[str, ...], Counter[str]] = {}
    for (number, *texts), counts in sums.items():
        day = datetime.fromtimestamp(number * _DAY, UTC).strftime("%Y-%m-%d")
        fitting = (tables.fitting(table.c[name], text) for name, text in zip(names[1:], texts, strict=True))
        rows.setdefault((day, *fitting), Counter()).update(counts)
    values: list[dict[str, Any]] = [
        dict(zip(names, of, strict=True)) | {name: counts[name] for name in _COUNTS}
        for of, counts in sorted(rows.items())  # in one order, so that no two wait for each other
    ]
    adding = database.insert(table)
    more = {name: table.c[name] + adding.excluded[name] for name in _COUNTS}
    await connection.execute(adding.on_conflict_do_update(index_elements=names, set_=more), values)


def _day(text: str, parameter: str) -> str:
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError as error:
        raise InvalidParameter(f"{parameter} is {text!r:.80}; give a day as 2026-11-29", parameter) from error
