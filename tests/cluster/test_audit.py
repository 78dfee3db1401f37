"""The audit log and what brings records there: nothing is lost, nothing counts twice, and no change stays unseen."""

import asyncio
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from audited import CONTENT_KEY, PEM, START, append, exported, numbers, record, rows, run
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from quire_cluster.governance import tables, usage
from quire_cluster.governance.budget import Budget
from quire_cluster.governance.chain import AuditLog, Checkpoint, Report, public_key_of, verify_export
from quire_cluster.governance.database import Database
from quire_cluster.governance.journal import Journal, read
from quire_cluster.governance.records import Record
from quire_cluster.governance.writer import Writer
from quire_engine.errors import InvalidParameter, Unavailable
from sqlalchemy import delete, func, select


@pytest.fixture
def url(database_url: str) -> str:
    return database_url


# ---- the chain ------------------------------------------------------------------------------------------------------


def test_what_was_appended_is_there_and_intact(url: str) -> None:
    async def work(database: Database, log: AuditLog) -> None:
        assert (await log.verify()) == Report(fault=None, records=0, end=None)
        assert await exported(log) == []
        for number in range(3):
            await append(database, log, *(record(10 * number + n) for n in range(10)))
        report = await log.verify()
        assert (report.fault, report.records) == (None, 30)
        assert report.end is not None
        assert (report.end.seq, report.end) == (30, await log.checkpoint())
        found = await log.list(tenant="t1", limit=3)
        assert [one.values["n"] for one in found] == [28, 25, 22]
        assert [one.seq for one in await log.list(before=3)] == [2, 1]
        assert [one.seq for one in await log.list(before=(1 << 64) - 1, limit=1)] == [30]
        assert verify_export(await exported(log), log.public_key) == report
        other = AuditLog(database, _another_key())
        assert "not signed by this key" in str((await other.verify()).fault)
        assert "not signed by this key" in str(verify_export(await exported(log), other.public_key).fault)

    run(url, work)


def _another_key() -> bytes:
    return Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A log in SQLite, and its export."""
    folder = tmp_path_factory.mktemp("kept")

    async def work(database: Database, log: AuditLog) -> list[str]:
        for number in range(4):
            contents = [record(3 * number + n, content=log.seal(f"text {n}".encode()) if n else None) for n in range(3)]
            await append(database, log, *contents)
        return await exported(log)

    lines: list[str] = run(f"sqlite:///{folder / 'audit.db'}", work)
    with sqlite3.connect(folder / "audit.db") as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("PRAGMA journal_mode=DELETE")
    return folder / "audit.db", lines


COLUMNS = [
    *(("audit", name) for name in ("seq", "at", "kind", "tenant", "key", "body", "hash")),
    *(("contents", name) for name in ("seq", "sealed")),
    *(("audit_end", name) for name in ("seq", "at", "hash", "first", "anchor", "erased", "signature")),
]


def tamper(connection: sqlite3.Connection, draw: Callable[[Any], Any]) -> None:
    """One change to one row, or the absence of some."""
    kind = draw(st.sampled_from(["byte", "byte", "byte", "delete", "swap", "copy", "truncate"]))
    table, column = draw(st.sampled_from(COLUMNS))
    rows = [one for (one,) in connection.execute(f"SELECT rowid FROM {table} ORDER BY rowid")]
    at = draw(st.sampled_from(rows))
    if kind == "byte":
        [(value,)] = connection.execute(f"SELECT {column} FROM {table} WHERE rowid = ?", (at,))
        changed: Any = value + draw(st.sampled_from([-1, 1, 256])) if isinstance(value, int) else None
        if changed is None:
            data = bytearray(value if isinstance(value, bytes) else value.encode())
            place = draw(st.integers(0, len(data) - 1))
            data[place] = data[place] ^ draw(st.integers(1, 127))
            changed = bytes(data) if isinstance(value, bytes) else data.decode()
        connection.execute("PRAGMA ignore_check_constraints=ON")
        try:
            connection.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (changed, at))
        except sqlite3.IntegrityError:  # another row's number: they change places
            connection.execute(f"UPDATE {table} SET {column} = 9999 WHERE rowid = ?", (at,))
    elif kind == "delete":
        connection.execute(f"DELETE FROM {table} WHERE rowid = ?", (at,))
    elif kind == "truncate":
        connection.execute("DELETE FROM audit WHERE seq >= ?", (draw(st.integers(1, 12)),))
    elif kind == "swap":
        one, other = draw(st.lists(st.integers(1, 12), min_size=2, max_size=2, unique=True))
        whole = draw(st.booleans())
        for old, new in ((one, 99), (other, one), (99, other)):
            connection.execute("UPDATE audit SET seq = ? WHERE seq = ?", (new, old))
            if whole:
                connection.execute("UPDATE contents SET seq = ? WHERE seq = ?", (new, old))
    else:
        new = draw(st.sampled_from([0, 13, 50]))
        columns = '"at", kind, tenant, "key", body, hash'
        connection.execute(f"INSERT INTO audit (seq, {columns}) SELECT ?, {columns} FROM audit WHERE seq = 5", (new,))


@given(st.data())
@settings(max_examples=150)
def test_any_change_of_a_row_is_found(kept: tuple[Path, list[str]], data: st.DataObject) -> None:
    original, _ = kept
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "audit.db"
        shutil.copy(original, path)
        connection = sqlite3.connect(path)
        before = list(connection.iterdump())
        tamper(connection, data.draw)
        connection.commit()
        assert list(connection.iterdump()) != before
        connection.close()

        async def work(database: Database, log: AuditLog) -> Report:
            return await log.verify()

        assert run(f"sqlite:///{path}", work).fault is not None


@given(st.data())
@settings(max_examples=150)
def test_any_change_of_a_byte_of_the_file_is_found(kept: tuple[Path, list[str]], data: st.DataObject) -> None:
    """Or changes nothing of what is on record: it is of a table that is not, or of room that is free."""
    original, lines = kept
    content = bytearray(original.read_bytes())
    # Half of the time in a page of the audit log's own.
    marks = [content.find(b'"kind":"request"', place * 7919 % len(content)) for place in range(20)]
    places = st.one_of(
        st.integers(0, len(content) - 1),
        st.tuples(st.sampled_from(marks), st.integers(-300, 300)).map(lambda p: max(0, sum(p)) % len(content)),
    )
    place = data.draw(places)
    content[place] ^= data.draw(st.integers(1, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "audit.db"
        path.write_bytes(content)

        async def work() -> tuple[Report, list[str]]:
            database = Database(f"sqlite:///{path}")
            log = AuditLog(database, PEM, CONTENT_KEY)
            try:
                return await log.verify(), await exported(log)
            finally:
                await database.close()

        try:
            report, now = asyncio.run(work())
        except Exception:  # SQLite or its driver says that the file is broken
            return
        assert report.fault is not None or now == lines


@given(st.data())
@settings(max_examples=300)
def test_any_change_of_an_export_is_found(kept: tuple[Path, list[str]], data: st.DataObject) -> None:
    _, lines = kept
    changed = list(lines)
    kind = data.draw(st.sampled_from(["byte", "delete", "swap", "copy", "truncate"]))
    at = data.draw(st.integers(0, len(lines) - 1))
    if kind == "byte":
        written = bytearray(changed[at].encode())
        written[data.draw(st.integers(0, len(written) - 1))] ^= data.draw(st.integers(1, 127))
        changed[at] = written.decode(errors="replace")
    elif kind == "delete":
        del changed[at]
    elif kind == "swap":
        other = data.draw(st.integers(0, len(lines) - 1).filter(lambda n: n != at))
        changed[at], changed[other] = changed[other], changed[at]
    elif kind == "copy":
        changed.insert(data.draw(st.integers(0, len(lines))), changed[at])
    else:
        del changed[max(1, at) :]

    def said(given: list[str]) -> Any:
        try:
            found = [json.loads(line) for line in given]
            return [
                one | {name: one[name].lower() for name in ("hash", "anchor", "signature") if name in one}
                for one in found
            ]
        except (ValueError, AttributeError, TypeError):
            return None

    report = verify_export(changed, public_key_of(PEM))
    assert report.fault is not None or said(changed) == said(lines), (kind, report)


def test_an_old_state_is_told_from_a_checkpoint_that_was_kept(url: str) -> None:
    async def work(database: Database, log: AuditLog) -> None:
        await append(database, log, record(1), record(2))
        old = [dict(row._mapping) for row in await rows(database, tables.audit_end)]
        await append(database, log, record(3))
        known = await log.checkpoint()
        assert known is not None
        again = Checkpoint.from_line(known.to_line())
        assert again == known
        await append(database, log, record(4))
        assert (await log.verify(known)).fault is None
        async with database.transaction() as connection:
            await connection.execute(delete(tables.audit).where(tables.audit.c.seq > 2))
            await connection.execute(tables.audit_end.update().values(old[0]))
        assert (await log.verify()).fault is None, "it was like that, once"
        assert (await log.verify(known)).fault == "the log ends before record 3, which is known"
        assert verify_export(await exported(log), log.public_key, known).fault is not None
        await append(database, log, record(5), record(6))
        assert (await log.verify(known)).fault == "record 3 is not the one that is known"
        forged = replace(known, seq=1)
        assert "the checkpoint that is known is not signed" in str((await log.verify(forged)).fault)

    run(url, work)
    for line in ("", "{}", "[]", "x", '{"seq": "1"}', '{"seq":1,"at":1,"hash":"zz","anchor":"","signature":""}'):
        with pytest.raises(InvalidParameter):
            Checkpoint.from_line(line)


@pytest.mark.parametrize("what", ["records", "end", "all records", "forged"])
def test_a_log_that_was_cut_short_is_not_signed_as_if_it_were_whole(url: str, what: str) -> None:
    async def work(database: Database, log: AuditLog) -> None:
        await append(database, log, *(record(n) for n in range(5)))
        async with database.transaction() as connection:
            if what == "end":
                await connection.execute(delete(tables.audit_end))
            elif what == "forged":
                await connection.execute(tables.audit_end.update().values(seq=3))
            else:
                await connection.execute(
                    delete(tables.audit).where(tables.audit.c.seq > (3 if what == "records" else 0))
                )
        assert (await log.verify()).fault is not None
        await append(database, log, record(6))
        await append(database, log, record(7))
        assert (await log.verify()).fault is not None, "for ever"
        assert [one.values["n"] for one in await log.list(kind="request", limit=2)] == [7, 6], "it goes on"

    run(url, work)


def test_what_is_past_its_retention_goes_and_the_rest_stays_intact(url: str) -> None:
    day = 86400

    async def work(database: Database, log: AuditLog) -> None:
        for number in range(10):
            await append(database, log, record(number, at=START + number * day, content=log.seal(b"said")))
        async with database.transaction() as connection:
            await log.retire(connection, START + 10 * day, days=6, content_days=3)
        report = await log.verify()
        assert (report.fault, report.records) == (None, 6)
        assert report.end is not None
        assert (report.end.first, report.end.erased) == (5, 8)
        assert [await _content(log, seq) for seq in range(5, 11)] == [None] * 3 + [b"said"] * 3
        assert verify_export(await exported(log), log.public_key).fault is None
        await append(database, log, record(11, at=START + 11 * day))
        assert (await log.verify()).fault is None
        for table, seq, fault in (
            (tables.contents, 9, "the content of record 9 is missing"),
            (tables.audit, 5, "record 5 is missing"),
        ):
            async with database.transaction() as connection:
                await connection.execute(delete(table).where(table.c.seq == seq))
            assert (await log.verify()).fault == fault

    run(url, work)

    async def nothing_left(database: Database, log: AuditLog) -> None:
        await append(database, log, record(1))
        async with database.transaction() as connection:
            await log.retire(connection, START + 100 * day, days=6, content_days=3)
        assert (await log.verify()).records == 0
        await append(database, log, record(2))
        assert ((await log.verify()).fault, (await log.verify()).records) == (None, 1)

    if url.startswith("sqlite"):
        run(url + "2", nothing_left)


async def _content(log: AuditLog, seq: int) -> bytes | None:
    try:
        return await log.content(seq)
    except InvalidParameter:
        return None


def test_content_is_encrypted(kept: tuple[Path, list[str]]) -> None:
    path, lines = kept
    assert b"text 1" not in path.read_bytes()
    assert "text 1" not in "".join(lines)

    async def work(database: Database, log: AuditLog) -> None:
        assert await log.content(2) == b"text 1"
        with pytest.raises(InvalidParameter):
            await log.content(1)

    run(f"sqlite:///{path}", work)


def test_content_of_one_record_is_not_read_as_anothers(url: str) -> None:
    async def work(database: Database, log: AuditLog) -> None:
        await append(database, log, *(record(n, content=log.seal(b"said %d" % n)) for n in (1, 2)))
        contents = tables.contents
        async with database.transaction() as connection:
            second = (await connection.execute(select(contents.c.sealed).where(contents.c.seq == 2))).scalar_one()
            await connection.execute(contents.update().where(contents.c.seq == 1).values(sealed=second))
        assert await log.content(2) == b"said 2"
        with pytest.raises(InvalidParameter, match="was changed"):
            await log.content(1)

    run(url, work)


# ---- on the way there -----------------------------------------------------------------------------------------------

# A gateway that puts numbered records on record and says which, and brings them to the database meanwhile.
GATEWAY = """
import asyncio, sys
from audited import PEM, record
from quire_cluster.governance.chain import AuditLog
from quire_cluster.governance.database import Database
from quire_cluster.governance.journal import Journal
from quire_cluster.governance.writer import Writer
url, folder, first, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
async def run():
    database = Database(url)
    journal = Journal(folder)
    writer = Writer(database, AuditLog(database, PEM), journal)
    running = asyncio.ensure_future(writer.run())
    for number in range(first, first + count):
        journal.append(record(number))
        print(number, flush=True)
        await asyncio.sleep(0.001)
    await writer.flush()
    running.cancel()
    await database.close()
asyncio.run(run())
"""


def gateway(url: str, folder: Path, first: int, count: int) -> "subprocess.Popen[str]":
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    return subprocess.Popen(
        [sys.executable, "-c", GATEWAY, url, str(folder), str(first), str(count)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )


def test_a_killed_gateway_loses_nothing_that_it_had_said(url: str, tmp_path: Path) -> None:
    """Killed at some moment of appending and bringing; the next one on the host goes on, and may be killed, too."""
    run(url, lambda database, log: _nothing())
    folder = tmp_path / "journal"
    chance = random.Random(1)
    said: list[int] = []
    for life in range(4):
        process = gateway(url, folder, 10000 * life, 5000)
        assert process.stdout is not None
        said += [int(process.stdout.readline()) for _ in range(chance.randint(1, 400))]
        process.send_signal(signal.SIGKILL)
        said += [int(line) for line in process.stdout.read().split("\n")[:-1]]
        process.wait()

    async def work(database: Database, log: AuditLog) -> None:
        writer = Writer(database, log, Journal(str(folder)))
        await asyncio.gather(writer.collect(), Writer(database, log, Journal(str(folder))).collect())
        found = await numbers(database)
        assert set(said) <= found.keys()
        assert set(found.values()) == {1}
        assert len(found) <= len(said) + 4, "of each life one may have been written and not said"
        assert (await log.verify()).fault is None
        async with database.snapshot() as connection:
            rows = await usage.query(connection, by="model")
            assert sum(row.requests for row in rows) == len(found)
            assert sum(row.prompt_tokens for row in rows) == sum(found)
            assert (await connection.execute(select(func.count()).select_from(tables.journals))).scalar_one() == 0
        left = list(folder.glob("*.journal"))
        assert len(left) == 2, "those that live"

    run(url, work)


async def _nothing() -> None: ...


def test_several_gateways_write_one_log(url: str, tmp_path: Path) -> None:
    run(url, lambda database, log: _nothing())
    processes = [gateway(url, tmp_path / f"host{n % 2}", 1000 * n, 300) for n in range(3)]
    for process in processes:
        process.communicate()
        assert process.returncode == 0

    async def work(database: Database, log: AuditLog) -> None:
        assert await numbers(database) == Counter(1000 * n + m for n in range(3) for m in range(300))
        assert (await log.verify()).fault is None
        async with database.snapshot() as connection:
            assert await usage.month_tokens(connection, START) == {
                f"t{t}": sum(n + 2 for g in range(3) for n in range(1000 * g, 1000 * g + 300) if n % 3 == t)
                for t in range(3)
            }

    run(url, work)


def test_what_comes_while_the_database_is_away_waits(url: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """And is there, once, when it is back."""
    is_sqlite = url.startswith("sqlite")

    async def work(database: Database, log: AuditLog) -> None:
        journal = Journal(str(tmp_path / "journal"))
        writer = Writer(database, log, journal)
        journal.append(record(1))
        await writer.flush()
        if is_sqlite:
            path = Path(url.removeprefix("sqlite:///"))
            shutil.move(path, tmp_path / "away")
            path.mkdir()
        else:
            request.getfixturevalue("postgres_server").stop()
        for number in range(2, 50):
            journal.append(record(number))
        with pytest.raises(Unavailable):
            await writer._drain()
        assert writer.pending == 48
        if is_sqlite:
            path.rmdir()
            shutil.move(tmp_path / "away", path)
        else:
            request.getfixturevalue("postgres_server").start()
        await writer.flush()
        assert writer.pending == 0
        assert await numbers(database) == Counter(range(1, 50))
        assert (await log.verify()).fault is None

    run(url, work)


def test_an_answer_of_the_database_that_was_lost_counts_once(url: str, tmp_path: Path) -> None:
    async def work(database: Database, log: AuditLog) -> None:
        journal = Journal(str(tmp_path / "journal"))
        writer = Writer(database, log, journal)
        journal.append(record(1))
        journal.append(record(2))
        bring = writer._bring

        async def lost(*given: Any) -> int:
            await bring(*given)
            raise Unavailable("it was done, and nobody heard of it")

        with pytest.MonkeyPatch.context() as patched, pytest.raises(Unavailable):
            patched.setattr(writer, "_bring", lost)
            await writer._drain()
        journal.append(record(3))
        await writer.flush()
        assert (await numbers(database), writer.pending) == (Counter([1, 2, 3]), 0)

    run(url, work)


def test_a_database_that_was_put_back_gets_again_what_it_lacks(tmp_path: Path) -> None:
    """Its file is replaced by a copy of before, while a gateway goes on."""

    async def work(database: Database, log: AuditLog) -> None:
        journal = Journal(str(tmp_path / "journal"))
        writer = Writer(database, log, journal)
        budget = Budget(database, writer)
        path = tmp_path / "audit.db"

        async def serve(first: int, last: int) -> None:
            for number in range(first, last):
                budget.add("t0", 1)
                journal.append(record(number))
            await writer.flush()

        await serve(0, 3)
        shutil.copy(path, tmp_path / "backup.db")
        await serve(3, 9)
        shutil.copy(tmp_path / "backup.db", path)
        await serve(9, 12)
        assert await numbers(database) == Counter(range(12))
        assert (await log.verify()).fault is None
        async with database.snapshot() as connection:
            [row] = await usage.query(connection, by="model")
        assert (row.requests, row.prompt_tokens) == (12, sum(range(12)))
        assert writer.pending == 0
        await budget.look()

    run(f"sqlite:///{tmp_path / 'audit.db'}", work)


def test_a_journal_that_somebody_deletes_is_brought_all_the_same(tmp_path: Path) -> None:
    async def work(database: Database, log: AuditLog) -> None:
        journal = Journal(str(tmp_path / "journal"))
        writer = Writer(database, log, journal)
        journal.append(record(1))
        await writer.flush()
        deleted = journal.path
        deleted.unlink()
        journal.append(record(2))
        await writer.flush()
        assert await numbers(database) == Counter([1, 2])
        journal.append(record(3))
        assert journal.path != deleted and read(journal.path, 0, 1 << 20)[0] == [record(3)]
        await writer.flush()
        assert (await numbers(database), writer.pending) == (Counter([1, 2, 3]), 0)

    run(f"sqlite:///{tmp_path / 'audit.db'}", work)


def test_what_is_no_journal_stops_nobody(tmp_path: Path) -> None:
    async def work(database: Database, log: AuditLog) -> None:
        journal = Journal(str(tmp_path / "journal"))
        writer = Writer(database, log, journal)
        (journal.folder / "none.journal").mkdir()
        running = asyncio.ensure_future(writer.run())
        for number in range(2):
            journal.append(record(number))
            while await numbers(database) != Counter(range(number + 1)):
                assert not running.done(), running.result()
                await asyncio.sleep(0.01)
        running.cancel()

    run(f"sqlite:///{tmp_path / 'audit.db'}", work)


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records are written as far as they go, and go on where they stopped."""
    journal = Journal(str(tmp_path))
    real, room = os.write, 0

    def full(descriptor: int, data: bytes) -> int:
        nonlocal room
        if not room:
            raise OSError(28, "No space left on device")
        taken = real(descriptor, data[:room])
        room -= taken
        return taken

    monkeypatch.setattr(os, "write", full)
    written: list[Record] = []
    chance = random.Random(0)
    for number in range(100):
        room += chance.randint(0, 300)
        written.append(record(number))
        journal.append(written[-1])
        found, _ = read(journal.path, 0, 1 << 20)
        assert found == written[: len(found)]
    room = 1 << 20
    journal.write()
    assert journal.healthy
    assert read(journal.path, 0, 1 << 20)[0] == written


@given(st.data())
@settings(max_examples=200)
def test_a_torn_journal_gives_what_is_whole(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(folder)
        records = [record(n, body={"text": "ä" * data.draw(st.integers(0, 30))}) for n in range(4)]
        for one in records:
            journal.append(one)
        content = journal.path.read_bytes()
        cut = data.draw(st.integers(0, len(content)))
        journal.path.write_bytes(content[:cut])
        share = data.draw(st.integers(8, 200))
        found, position = [], 0
        while True:
            some, position = read(journal.path, position, share)
            if not some:
                break
            found += some
        assert found == records[: len(found)]
        assert len(found) == 4 or cut < len(content)
        sizes = [len(one.to_bytes()) + 8 for one in records]
        assert len(found) == sum(sum(sizes[: n + 1]) <= cut for n in range(4)), "all that is whole"
        journal.close()


def test_a_large_journal_is_followed_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire_cluster.governance.writer._LARGE", 1000)

    async def work(database: Database, log: AuditLog) -> None:
        journal = Journal(str(tmp_path / "journal"))
        writer = Writer(database, log, journal)
        for number in range(100):
            journal.append(record(number))
            if number % 10 == 9:
                await writer.flush()
        await writer.collect()
        assert len(list((tmp_path / "journal").glob("*"))) == 1
        assert await numbers(database) == Counter(range(100))

    run(f"sqlite:///{tmp_path / 'audit.db'}", work)
