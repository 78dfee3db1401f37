"""The audit log: each record's hash covers its body and the hash before it, and the log's end is signed.

Whoever changes, removes or moves a record has to change every hash behind it, and the end, whose signature (Ed25519,
RFC 8032) needs the signing key. An old state of the whole database, signed as it was then, can be told from the present
one only by a checkpoint that was kept elsewhere.
"""

import asyncio
import hashlib
import json
import logging
import os
import struct
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from quire_engine.errors import InvalidParameter
from sqlalchemy import delete, exists, func, insert, select, text

from quire_cluster.governance import tables
from quire_cluster.governance.database import Connection, Database
from quire_cluster.governance.records import Record, canonical

log = logging.getLogger(__name__)
GENESIS = bytes(32)  # before the first record
_FAULT = "fault"  # the kind of a record that says what was wrong with the log
_DOMAIN = b"quire audit log 1"
_NUMBERS = struct.Struct(">QQQQ")
_PAGE = 1000  # records that are read at once
_LOCK = 0x51756973  # of PostgreSQL's advisory locks: one process appends at a time
_NONCE = 12  # bytes
_ROWS = 100  # that one statement brings: others on the event loop have their turn between two
_RETIRED = 10  # pages of records that are looked at in one transaction
_LARGEST = (1 << 63) - 1  # that a database takes for a number


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """That the log had this end, signed."""

    seq: int  # of the last record
    at: int  # seconds since 1970
    hash: bytes  # of the last record
    first: int = 1  # the first record that is kept
    anchor: bytes = GENESIS  # the hash before that one
    erased: int = 1  # before this record content may be erased
    signature: bytes = b""

    def signed(self, key: Ed25519PrivateKey) -> "Checkpoint":
        """By whoever may."""
        return replace(self, signature=key.sign(self._message))

    def is_signed(self, key: Ed25519PublicKey) -> bool:
        """By whoever may."""
        try:
            key.verify(self.signature, self._message)
        except (InvalidSignature, struct.error):  # or of numbers that no checkpoint has
            return False
        return True

    @property
    def _message(self) -> bytes:
        return _DOMAIN + _NUMBERS.pack(self.seq, self.at, self.first, self.erased) + self.hash + self.anchor

    def to_line(self) -> str:
        """One of JSON."""
        return canonical(
            {name: value.hex() if isinstance(value, bytes) else value for name, value in asdict(self).items()}
        ).decode()

    @staticmethod
    def from_line(line: str) -> "Checkpoint":
        """The inverse. Raises InvalidParameter."""
        try:
            values = json.loads(line)
            for name in ("hash", "anchor", "signature"):
                values[name] = bytes.fromhex(values[name])
            made = Checkpoint(**values)
            _NUMBERS.pack(made.seq, made.at, made.first, made.erased)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, struct.error) as error:
            raise InvalidParameter(
                "the checkpoint is none; give a line that `quire audit checkpoint` wrote", "checkpoint"
            ) from error
        return made


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A record in the log."""

    seq: int
    body: bytes  # JSON
    hash: bytes

    @property
    def values(self) -> dict[str, Any]:
        """Of the body. Raises ValueError for what is no record."""
        found = json.loads(self.body)
        if not isinstance(found, dict):
            raise ValueError("it is no object of JSON")
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a look through the whole log found."""

    fault: str | None  # the first that is wrong; None: nothing is
    records: int
    end: Checkpoint | None


def hash_of(before: bytes, seq: int, body: bytes) -> bytes:
    """Of a record."""
    return hashlib.sha256(before + seq.to_bytes(8, "big") + body).digest()


def _filed(values: dict[str, Any]) -> dict[str, Any]:
    """The columns that a record is found by, out of its body. Raises ValueError for what is no record."""
    try:
        columns = {name: tables.fitting(tables.audit.c[name], values[name]) for name in ("kind", "tenant", "key")}
        return columns | {"at": int(values["at"])}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it says nothing of {error}") from error


def public_key_of(pem: bytes) -> Ed25519PublicKey:
    """Of a private key, or of a public one. Raises InvalidParameter."""
    try:
        key: Any = serialization.load_pem_private_key(pem, None).public_key()
    except (ValueError, TypeError):
        try:
            key = serialization.load_pem_public_key(pem)
        except ValueError as error:
            raise InvalidParameter("the key is neither a private nor a public one in PEM", "key") from error
    if not isinstance(key, Ed25519PublicKey):
        raise InvalidParameter("the key is not of Ed25519", "key")
    return key


class _Chain:
    """Follows the log from its beginning; `fault` is the first thing that is wrong."""

    def __init__(self, end: Checkpoint | None, key: Ed25519PublicKey, known: Checkpoint | None) -> None:
        self.fault: str | None = None
        self.records = 0
        self._end, self._known = end, known
        self._next, self._hash = (end.first, end.anchor) if end is not None else (1, GENESIS)
        if end is not None and not end.is_signed(key):
            self._wrong("the log's end is not signed by this key")
        if known is not None and not known.is_signed(key):
            self._wrong("the checkpoint that is known is not signed by this key")
        if known is not None and (end is None or end.seq < known.seq):
            self._wrong(f"the log ends before record {known.seq}, which is known")

    def _wrong(self, why: str) -> None:
        self.fault = self.fault or why

    def take(self, entry: Entry) -> None:
        """The next record."""
        if self._end is None:
            self._wrong("there are records, and no signed end")
        elif entry.seq != self._next:
            self._wrong(f"record {self._next} is missing" if entry.seq > self._next else f"record {entry.seq} is extra")
        elif entry.hash != hash_of(self._hash, entry.seq, entry.body):
            self._wrong(f"record {entry.seq} was changed, or the one before it")
        self._next, self._hash = entry.seq + 1, entry.hash
        self.records += 1
        if self._known is not None and entry.seq == self._known.seq and entry.hash != self._known.hash:
            self._wrong(f"record {entry.seq} is not the one that is known")
        if self.fault is None:
            values = entry.values
            if values.get("kind") == _FAULT:
                self._wrong(f"record {entry.seq} says: {values.get('fault')}")

    def report(self) -> Report:
        """At the end."""
        if self._end is not None and self._next != self._end.seq + 1:
            self._wrong(f"record {self._next} is missing")
        elif self._end is not None and self._hash != self._end.hash:
            self._wrong("the last record is not the one that is signed")
        return Report(fault=self.fault, records=self.records, end=self._end)


class AuditLog:
    """Appends to the log, and looks through it."""

    def __init__(self, database: Database, signing_key: bytes, content_key: bytes | None = None) -> None:
        """`signing_key`: of Ed25519, in PEM. `content_key`: 32 bytes of AES-256-GCM; None: no content is kept."""
        self._database = database
        key = serialization.load_pem_private_key(signing_key, None)
        assert isinstance(key, Ed25519PrivateKey), "the configuration checked it"
        self._key, self.public_key = key, key.public_key()
        self._cipher = AESGCM(content_key) if content_key is not None else None

    # ---- what is written ------------------------------------------------------------------------------------------

    async def append(self, connection: Connection, records: Sequence[Record]) -> None:
        """Within a transaction, which no other one appends beside."""
        await self.lock(connection)
        end = await self._end(connection)
        bodies = [(record, record.whole_body) for record in records]
        if (why := await self._unsound(connection, end)) is not None:
            fault = Record(kind=_FAULT, at=int(time.time()), tenant="", key="", body={"fault": why})
            bodies.insert(0, (fault, fault.whole_body))
            end = await self._as_found(connection, end)
        begin = end if end is not None else Checkpoint(seq=0, at=0, hash=GENESIS)
        rows, contents = await asyncio.to_thread(self._chained, begin.seq, begin.hash, bodies)
        for table, brought in ((tables.audit, rows), (tables.contents, contents)):
            for at in range(0, len(brought), _ROWS):
                await connection.execute(insert(table), brought[at : at + _ROWS])
        await self._sign(connection, replace(begin, seq=rows[-1]["seq"], at=int(time.time()), hash=rows[-1]["hash"]))

    def _chained(
        self, seq: int, before: bytes, bodies: Sequence[tuple[Record, dict[str, Any]]]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The rows of records behind another one, and those of their content."""
        rows, contents = [], []
        for record, body in bodies:
            seq += 1
            if record.content is not None:
                body |= {"content_sha256": hashlib.sha256(record.content).hexdigest()}
                contents.append({"seq": seq, "sealed": record.content})
            written = canonical(body)
            before = hash_of(before, seq, written)
            rows.append({"seq": seq, "body": written, "hash": before} | _filed(body))
        return rows, contents

    async def lock(self, connection: Connection) -> None:
        """Until the transaction ends. SQLite's are alone anyway."""
        if not self._database.embedded:
            await connection.execute(text(f"SELECT pg_advisory_xact_lock({_LOCK})"))

    async def _end(self, connection: Connection) -> Checkpoint | None:
        row = (await connection.execute(select(tables.audit_end).where(tables.audit_end.c.id == 1))).one_or_none()
        if row is None:
            return None
        return Checkpoint(**{name: value for name, value in row._mapping.items() if name != "id"})

    async def _sign(self, connection: Connection, end: Checkpoint) -> None:
        values = asdict(end.signed(self._key)) | {"id": 1}
        putting = self._database.insert(tables.audit_end)
        rest = {name: putting.excluded[name] for name in values if name != "id"}
        await connection.execute(putting.on_conflict_do_update(index_elements=["id"], set_=rest), values)

    async def _last(self, connection: Connection) -> Any:
        table = tables.audit
        return (
            await connection.execute(select(table.c.seq, table.c.hash).order_by(table.c.seq.desc()).limit(1))
        ).one_or_none()

    async def _unsound(self, connection: Connection, end: Checkpoint | None) -> str | None:
        """Why the log cannot just go on: signing what somebody has cut short would hide it."""
        last = await self._last(connection)
        if end is None:
            return None if last is None else "the signed end was missing when the log went on"
        if not end.is_signed(self.public_key):
            return "the end was not signed by this key when the log went on"
        if (last.seq, last.hash) != (end.seq, end.hash) if last is not None else end.seq >= end.first:
            return f"the log did not end with record {end.seq}, which was signed, when it went on"
        return None

    async def _as_found(self, connection: Connection, end: Checkpoint | None) -> Checkpoint:
        """Where an unsound log goes on."""
        last = await self._last(connection)
        if end is None or not end.is_signed(self.public_key):  # what it says is nobody's word
            end = Checkpoint(seq=0, at=0, hash=GENESIS)
        return replace(end, seq=max(last.seq, end.seq), hash=last.hash) if last is not None else end

    @property
    def keeps_content(self) -> bool:
        """Whether it has a key for it."""
        return self._cipher is not None

    def seal(self, content: bytes) -> bytes:
        """As a record keeps it, encrypted. Whose it is says the record, by its SHA-256."""
        assert self._cipher is not None, "no content is kept"
        nonce = os.urandom(_NONCE)
        return nonce + self._cipher.encrypt(nonce, content, None)

    async def retire(self, connection: Connection, now: int, *, days: int | None, content_days: int) -> bool:
        """Deletes records older than `days`, and content older than `content_days`, within a transaction: some ten
        thousand. True: there may be more. How old a record is, its hash tells: its column may be written by others."""
        await self.lock(connection)
        end = await self._end(connection)
        if end is None or await self._unsound(connection, end) is not None:
            return False
        audit, contents = tables.audit, tables.contents
        kept = end
        if days is not None:
            first, anchor = await self._older(connection, end.first, end.anchor, now - days * 86400)
            kept = replace(kept, first=first, anchor=anchor, erased=max(end.erased, first))
        asked = select(audit.c.hash).where(audit.c.seq == kept.erased - 1)
        before = (await connection.execute(asked)).scalar_one_or_none() if kept.erased > kept.first else kept.anchor
        if before is not None:
            erased, _ = await self._older(connection, kept.erased, before, now - content_days * 86400)
            kept = replace(kept, erased=erased)
        if kept == end:
            return False
        await connection.execute(delete(audit).where(audit.c.seq < kept.first))
        await connection.execute(delete(contents).where(contents.c.seq < kept.erased))
        await self._sign(connection, replace(kept, at=now))
        return True

    async def _older(self, connection: Connection, seq: int, before: bytes, at: int) -> tuple[int, bytes]:
        """The first record from one on that is not older, and the hash before it. Where one of them was changed: none
        is."""
        begin, end = (seq, before), seq + _RETIRED * _PAGE
        table = tables.audit
        while seq < end:
            page = select(table.c.seq, table.c.body, table.c.hash).where(table.c.seq >= seq).order_by(table.c.seq)
            rows = (await connection.execute(page.limit(_PAGE))).all()
            for row in rows:
                if row.seq != seq or row.hash != hash_of(before, seq, row.body):
                    log.error("record %d was changed: nothing is retired; see `quire audit verify`", row.seq)
                    return begin
                if json.loads(row.body)["at"] >= at:
                    return seq, before
                seq, before = seq + 1, row.hash
            if len(rows) < _PAGE:
                break
        return seq, before

    # ---- what is read ---------------------------------------------------------------------------------------------

    async def checkpoint(self) -> Checkpoint | None:
        """The log's end: to be kept where nobody who may write the database can. None: nothing is on record."""
        async with self._database.snapshot() as connection:
            return await self._end(connection)

    async def _pages(self, connection: Connection) -> AsyncIterator[Sequence[Any]]:
        """Every record's row."""
        table, after = tables.audit, -(1 << 62)
        while True:
            page = select(table).where(table.c.seq > after).order_by(table.c.seq).limit(_PAGE)
            rows = (await connection.execute(page)).all()
            if rows:
                yield rows
            if len(rows) < _PAGE:
                return
            after = rows[-1].seq

    async def verify(self, known: Checkpoint | None = None, key: Ed25519PublicKey | None = None) -> Report:
        """Looks through all of it. `known`: a checkpoint that was kept elsewhere. `key`: in place of this log's own.
        Raises Unavailable where the database cannot be read."""
        chain = _Chain(None, key or self.public_key, None)
        try:
            async with self._database.snapshot() as connection:
                end = await self._end(connection)
                chain = _Chain(end, key or self.public_key, known)
                await self._follow(connection, chain, end)
        except (ValueError, TypeError, OverflowError) as error:  # of what no writer of ours has left there
            chain.fault = chain.fault or f"what follows {chain.records} good records cannot be read: {error}"
        return chain.report()

    async def _follow(self, connection: Connection, chain: _Chain, end: Checkpoint | None) -> None:
        """All that is there, up to the first fault."""
        audit, contents = tables.audit, tables.contents
        async for rows in self._pages(connection):
            between = contents.c.seq.between(rows[0].seq, rows[-1].seq)
            kept = set((await connection.execute(select(contents.c.seq).where(between))).scalars())
            for row in rows:
                chain.take(_entry(row))
                if chain.fault is None:
                    content = await _sealed(connection, row.seq) if row.seq in kept else None
                    chain.fault = _fault_beside(row, content, end)
                if chain.fault is not None:
                    return
            await asyncio.sleep(0)
        stray = select(contents.c.seq).where(~exists().where(audit.c.seq == contents.c.seq)).limit(1)
        if (seq := (await connection.execute(stray)).scalar_one_or_none()) is not None:
            chain.fault = f"there is content of record {seq}, which has none"
        ends = select(func.count()).select_from(tables.audit_end)
        if (await connection.execute(ends)).scalar_one() > (end is not None):
            chain.fault = "there is another end than the one that is signed"

    async def export(self) -> AsyncIterator[str]:
        """Lines of JSON: the signed end, and then every record. `verify_export` looks through them."""
        async with self._database.snapshot() as connection:
            end = await self._end(connection)
            if end is None:
                return
            yield end.to_line()
            async for rows in self._pages(connection):
                for entry in map(_entry, rows):
                    line = {"seq": entry.seq, "hash": entry.hash.hex(), "body": entry.body.decode()}
                    yield canonical(line).decode()

    async def list(
        self, *, tenant: str | None = None, kind: str | None = None, before: int | None = None, limit: int = 100
    ) -> "list[Entry]":
        """The newest first. `before`: a record's number. Raises InvalidParameter."""
        if not 1 <= limit <= _LARGEST:
            raise InvalidParameter(f"limit is {limit}; give a number of records, from 1 on", "limit")
        table = tables.audit
        asked = select(table).order_by(table.c.seq.desc()).limit(limit)
        for column, value in ((table.c.tenant, tenant), (table.c.kind, kind)):
            if value is not None:
                asked = asked.where(column == value)
        if before is not None:
            asked = asked.where(table.c.seq < min(before, _LARGEST))
        async with self._database.snapshot() as connection:
            rows = (await connection.execute(asked)).all()
        return [_entry(row) for row in rows]

    async def content(self, seq: int) -> bytes:
        """That was kept of a record. Raises InvalidParameter where none is, or with another key."""
        async with self._database.snapshot() as connection:
            sealed = await _sealed(connection, seq)
            row = (await connection.execute(select(tables.audit).where(tables.audit.c.seq == seq))).one_or_none()
        if sealed is None or row is None or self._cipher is None:
            raise InvalidParameter(f"no content of record {seq} can be read: none is kept, or no key is there", "seq")
        try:
            if hashlib.sha256(sealed).hexdigest() != _entry(row).values.get("content_sha256"):
                raise InvalidTag
            return self._cipher.decrypt(sealed[:_NONCE], sealed[_NONCE:], None)
        except InvalidTag as error:
            raise InvalidParameter(
                f"the content of record {seq} is not of this content_key, or was changed; see `quire audit verify`",
                "seq",
            ) from error


def _entry(row: Any) -> Entry:
    return Entry(seq=row.seq, body=bytes(row.body), hash=bytes(row.hash))


async def _sealed(connection: Connection, seq: int) -> bytes | None:
    """The content of a record."""
    found = await connection.execute(select(tables.contents.c.sealed).where(tables.contents.c.seq == seq))
    return found.scalar_one_or_none()


def _fault_beside(row: Any, content: bytes | None, end: Checkpoint | None) -> str | None:
    """Of what stands beside a record's hash."""
    values = _entry(row).values
    if any(getattr(row, name) != value for name, value in _filed(values).items()):
        return f"record {row.seq} is filed under what it does not say"
    wanted = values.get("content_sha256")
    if content is None:
        lacks = wanted is not None and (end is None or row.seq >= end.erased)
        return f"the content of record {row.seq} is missing" if lacks else None
    if hashlib.sha256(content).hexdigest() != wanted:
        return f"the content of record {row.seq} was changed"
    return None


def verify_export(lines: Iterable[str], key: Ed25519PublicKey, known: Checkpoint | None = None) -> Report:
    """Looks through what `export` wrote, without the database."""
    rest = iter(lines)
    first = next(rest, None)
    try:
        end = Checkpoint.from_line(first) if first is not None else None
    except InvalidParameter:
        return Report(fault="the first line is no signed end", records=0, end=None)
    chain = _Chain(end, key, known)
    for number, line in enumerate(rest, 2):
        try:
            values = json.loads(line)
            body = values["body"].encode()
            entry = Entry(seq=values["seq"], body=body, hash=bytes.fromhex(values["hash"]))
            chain.take(entry)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
            return Report(fault=f"line {number} is no record", records=chain.records, end=end)
    return chain.report()
