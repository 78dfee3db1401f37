"""What may go wrong on a record's way to the database: it stops no others, and nothing is deleted unread."""

import asyncio
import json
import os
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from audited import PEM, START, append, exported, numbers, record, rows, run
from quire_cluster.governance import tables, usage
from quire_cluster.governance.chain import AuditLog, verify_export
from quire_cluster.governance.database import Database
from quire_cluster.governance.journal import Journal
from quire_cluster.governance.records import UsageDelta
from quire_cluster.governance.writer import Writer
from quire_engine.errors import InvalidParameter
from sqlalchemy import select, text

DAY = 86400


def orphan(folder: Path, count: int, **changes: Any) -> Path:
    """A journal of records from 0 on, whose gateway is gone."""
    journal = Journal(str(folder))
    for number in range(count):
        journal.append(record(number, **changes))
    journal.close()
    return journal.path


def framed(data: bytes) -> bytes:
    return struct.pack("<II", len(data), zlib.crc32(data)) + data


def later(content: bytes) -> bytes:
    values = json.loads(record(7).to_bytes()) | {"a field of another version": 1}
    return content + framed(json.dumps(values).encode())


def flipped(content: bytes) -> bytes:
    """A bit of the third record."""
    at = sum(len(framed(record(number).to_bytes())) for number in range(2)) + 20
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(
    "damage, left",
    [
        (lambda content: content + bytes(4096), 4),  # a machine fell: the file had grown, and its blocks are empty
        (lambda content: content + bytes(8), 4),
        (lambda content: content + framed(b"[]"), 4),
        (lambda content: content + b"\xff" * 40, 4),
        (lambda content: content[:-1], 3),
        (later, 4),
        (flipped, 2),
    ],
)
def test_what_cannot_be_read_of_a_journal_is_set_aside(
    tmp_path: Path, damage: Callable[[bytes], bytes], left: int
) -> None:
    """What is before it is brought, other journals are, too, and what is behind it is there for who can read it."""

    async def work(database: Database, log: AuditLog) -> None:
        path = orphan(tmp_path / "journal", 4)
        content = damage(path.read_bytes())
        path.write_bytes(content)
        journal = Journal(str(tmp_path / "journal"))
        writer = Writer(database, log, journal)
        journal.append(record(100))
        for _ in range(2):
            await writer.collect()
            await writer.flush()
            assert await numbers(database) == Counter([*range(left), 100])
            assert path.with_suffix(".torn").read_bytes() == content
            assert not path.exists()
        path.with_suffix(".torn").rename(path)
        await writer.collect()
        assert await numbers(database) == Counter([*range(left), 100]), "what was brought is known"
        path.with_suffix(".torn").rename(path)
        path.write_bytes(orphan(tmp_path / "mended", 4).read_bytes())
        await writer.collect()
        assert await numbers(database) == Counter([*range(4), 100]), "and the rest is brought when it can be read"
        assert not list((tmp_path / "journal").glob("*.torn"))

    run(f"sqlite:///{tmp_path / 'audit.db'}", work)


@pytest.mark.parametrize(
    "change",
    [
        {"tenant": "t" * 65},
        {"key": "k" * 256},
        {"key": "a\0b"},
        {"key": "\ud800"},
        {"body": {"n": 1, "text": "\0\ud800"}},
        {"usage": UsageDelta(model="m" * 256, prompt_tokens=1, cached_tokens=0, output_tokens=0)},
        {"usage": UsageDelta(model="\0\udfff", prompt_tokens=1, cached_tokens=0, output_tokens=0)},
    ],
)
def test_no_text_of_a_record_keeps_others_from_the_database(
    database_url: str, tmp_path: Path, change: dict[str, Any]
) -> None:
    async def work(database: Database, log: AuditLog) -> None:
        journal = Journal(str(tmp_path / "journal"))
        writer = Writer(database, log, journal)
        journal.append(record(1, **change))
        journal.append(record(2))
        await writer._drain()
        assert await numbers(database) == Counter([1, 2])
        assert (await log.verify()).fault is None
        for name in change.keys() & {"tenant", "key"}:
            assert (await log.list())[1].values[name] == change[name], "the body has all of it"
        path = tmp_path / "export"
        path.write_text("\n".join(await exported(log)), encoding="utf-8")
        assert verify_export(path.read_text(encoding="utf-8").splitlines(), log.public_key).fault is None

    run(database_url, work)


def test_a_writer_goes_on_after_whatever_went_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others see that nothing gets there; what waits is brought when it is over."""

    async def work(database: Database, log: AuditLog) -> None:
        journal = Journal(str(tmp_path / "journal"))
        writer = Writer(database, log, journal)
        real, failed = log.append, asyncio.Event()

        async def broken(*given: Any) -> None:
            failed.set()
            raise OverflowError("somebody wrote what no writer does")

        monkeypatch.setattr(log, "append", broken)
        running = asyncio.ensure_future(writer.run())
        journal.append(record(1))
        await failed.wait()
        while writer.away_since is None:
            await asyncio.sleep(0.01)
        assert writer.pending == 1
        monkeypatch.setattr(log, "append", real)
        await writer.flush()
        assert (writer.pending, writer.away_since, running.done()) == (0, None, False)
        assert await numbers(database) == Counter([1])
        running.cancel()

    run(f"sqlite:///{tmp_path / 'audit.db'}", work)


def test_without_room_for_another_journal_the_old_one_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire_cluster.governance.writer._LARGE", 100)
    real, full = os.open, False

    def opened(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if full and flags & os.O_EXCL:
            raise OSError(28, "No space left on device")
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", opened)

    async def work(database: Database, log: AuditLog) -> None:
        nonlocal full
        journal = Journal(str(tmp_path / "journal"))
        writer = Writer(database, log, journal)
        path = journal.path
        for number in range(9):
            full = number < 6
            journal.append(record(number))
            await writer.flush()
            assert (journal.path == path) == full
        await writer.collect()
        assert await numbers(database) == Counter(range(9))

    run(f"sqlite:///{tmp_path / 'audit.db'}", work)


def test_a_full_disk_is_tried_again_by_a_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(database: Database, log: AuditLog) -> None:
        journal = Journal(str(tmp_path / "journal"))
        writer = Writer(database, log, journal)
        real = os.write

        def full(descriptor: int, data: bytes) -> int:
            if descriptor == journal._descriptor:
                raise OSError(28, "No space left on device")
            return real(descriptor, data)

        monkeypatch.setattr(os, "write", full)
        journal.append(record(1))
        assert not journal.healthy
        flushing = asyncio.ensure_future(writer.flush())
        await asyncio.sleep(0.05)
        assert not flushing.done()
        monkeypatch.setattr(os, "write", real)
        await flushing
        assert journal.healthy
        assert await numbers(database) == Counter([1])

    run(f"sqlite:///{tmp_path / 'audit.db'}", work)


def test_content_of_a_journal_is_brought_by_a_gateway_without_a_key(tmp_path: Path) -> None:
    async def work(database: Database, log: AuditLog) -> None:
        orphan(tmp_path / "journal", 3, content=log.seal(b"said"))
        keyless = AuditLog(database, PEM)
        await Writer(database, keyless, Journal(str(tmp_path / "journal"))).collect()
        assert await numbers(database) == Counter(range(3))
        assert (await keyless.verify()).fault is None
        with pytest.raises(InvalidParameter, match="no key is there"):
            await keyless.content(2)
        assert await log.content(2) == b"said"

    run(f"sqlite:///{tmp_path / 'audit.db'}", work)


def test_content_under_another_key_is_told_so(tmp_path: Path) -> None:
    async def work(database: Database, log: AuditLog) -> None:
        await append(database, log, record(1, content=log.seal(b"said")))
        with pytest.raises(InvalidParameter, match="not of this content_key"):
            await AuditLog(database, PEM, b"d" * 32).content(1)

    run(f"sqlite:///{tmp_path / 'audit.db'}", work)


def test_an_older_state_of_the_database_gets_again_what_the_journal_has(tmp_path: Path) -> None:
    async def work(database: Database, log: AuditLog) -> None:
        journal = Journal(str(tmp_path / "journal"))
        writer = Writer(database, log, journal)
        kept = (tables.audit, tables.audit_end, tables.journals, tables.usage)
        for number in range(3):
            journal.append(record(number))
        await writer.flush()
        old = {table: [dict(row._mapping) for row in await rows(database, table)] for table in kept}
        for number in range(3, 6):
            journal.append(record(number))
        await writer.flush()
        async with database.transaction() as connection:
            for table, before in old.items():
                await connection.execute(table.delete())
                await connection.execute(table.insert(), before)
        journal.append(record(6))
        await writer.flush()
        await writer._drain()
        assert (writer.pending, await numbers(database)) == (0, Counter(range(7)))
        async with database.snapshot() as connection:
            [used] = await usage.query(connection, by="model")
        assert (used.requests, used.prompt_tokens) == (7, sum(range(7)))

    run(f"sqlite:///{tmp_path / 'audit.db'}", work)


def test_tokens_of_a_month_are_of_that_month(tmp_path: Path) -> None:
    """2026-09-21 and the months beside it."""

    async def work(database: Database, log: AuditLog) -> None:
        times = [START - 40 * DAY, START, START + 5, START + 40 * DAY]
        async with database.transaction() as connection:
            await usage.add(database, connection, [record(3, at=at) for at in times])
        async with database.snapshot() as connection:
            months = [await usage.month_tokens(connection, START + days * DAY) for days in (-40, 0, 40, 80)]
        assert months == [{"t0": 5}, {"t0": 10}, {"t0": 5}, {}]

    run(f"sqlite:///{tmp_path / 'audit.db'}", work)


# ---- whoever can only write the database ----------------------------------------------------------------------------


@pytest.mark.parametrize("days", [30, None])
def test_retention_does_not_believe_the_column(database_url: str, days: int | None) -> None:
    """Records that are made old in it would be deleted by the writer itself, and that signed."""

    async def work(database: Database, log: AuditLog) -> None:
        await append(database, log, *(record(n, content=log.seal(b"said")) for n in range(10)))
        async with database.transaction() as connection:
            await connection.execute(tables.audit.update().where(tables.audit.c.seq < 10).values(at=0))
        async with database.transaction() as connection:
            assert not await log.retire(connection, START + 100, days=days, content_days=30)
        assert (len(await rows(database, tables.audit)), len(await rows(database, tables.contents))) == (10, 10)
        assert (await log.verify()).fault == "record 1 is filed under what it does not say"

    run(database_url, work)


def test_retention_stops_before_what_was_changed(database_url: str) -> None:
    async def work(database: Database, log: AuditLog) -> None:
        await append(database, log, *(record(n, at=START + n) for n in range(10)))
        async with database.transaction() as connection:
            body = (await connection.execute(select(tables.audit.c.body).where(tables.audit.c.seq == 4))).scalar_one()
            changed = tables.audit.update().where(tables.audit.c.seq == 4)
            await connection.execute(changed.values(body=body.replace(b'"n":3', b'"n":9')))
        async with database.transaction() as connection:
            assert not await log.retire(connection, START + 100 * DAY, days=30, content_days=30)
        assert len(await rows(database, tables.audit)) == 10
        assert (await log.verify()).fault == "record 4 was changed, or the one before it"

    run(database_url, work)


def test_retention_goes_in_steps(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no transaction takes long, however much there is."""
    monkeypatch.setattr("quire_cluster.governance.chain._PAGE", 2)
    monkeypatch.setattr("quire_cluster.governance.chain._RETIRED", 3)

    async def work(database: Database, log: AuditLog) -> None:
        await append(database, log, *(record(n, at=START + n, content=log.seal(b"said")) for n in range(20)))
        left = []
        while True:
            async with database.transaction() as connection:
                if not await log.retire(connection, START + DAY + 17, days=1, content_days=1):
                    break
            assert (await log.verify()).fault is None
            left.append(len(await rows(database, tables.audit)))
        assert left[0] == 14
        assert left[-1] == 3
        assert len(await rows(database, tables.contents)) == 3

    run(database_url, work)


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO audit_end SELECT 2, seq, at, hash, first, anchor, erased, signature FROM audit_end",
        "UPDATE audit_end SET seq = -1",
        "UPDATE audit_end SET seq = 9223372036854775807",
        "UPDATE audit_end SET first = -5, erased = -5",
        "UPDATE audit SET body = CAST(body AS TEXT) WHERE seq = 2",
        "UPDATE audit SET body = 'no json' WHERE seq = 2",
        "UPDATE audit SET at = 'soon' WHERE seq = 2",
        "UPDATE audit SET hash = 'x' WHERE seq = 2",
        "INSERT INTO contents VALUES (99, x'00')",
        "INSERT INTO contents VALUES (2, x'00')",
        "DELETE FROM audit",
    ],
)
def test_whatever_was_written_there_is_a_fault_and_no_crash(tmp_path: Path, statement: str) -> None:
    """Also after the log has gone on."""

    async def work(database: Database, log: AuditLog) -> None:
        await append(database, log, *(record(n) for n in range(3)))
        async with database.transaction() as connection:
            await connection.execute(text(statement))
        assert (await log.verify()).fault is not None
        journal = Journal(str(tmp_path / "journal"))
        journal.append(record(9))
        await Writer(database, log, journal).flush()
        assert (await log.verify()).fault is not None

    run(f"sqlite:///{tmp_path / 'audit.db'}", work)


def test_a_record_may_say_fault(tmp_path: Path) -> None:
    """What is wrong with the log, records of a kind of their own say."""

    async def work(database: Database, log: AuditLog) -> None:
        await append(database, log, record(1, body={"n": 1, "fault": "a word of a client's"}))
        assert (await log.verify()).fault is None

    run(f"sqlite:///{tmp_path / 'audit.db'}", work)
