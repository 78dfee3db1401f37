"""The database's tables. What changes here needs a migration in `migrations/versions`."""

from sqlalchemy import (
    BigInteger,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
)

metadata = MetaData(
    naming_convention={"ix": "ix_%(table_name)s_%(column_0_name)s", "fk": "fk_%(table_name)s_%(column_0_name)s"}
)


def fitting(column: Column[str], text: str) -> str:
    """As much of a text as the column takes: PostgreSQL knows no NUL, and no database lone surrogates. Where all of it
    counts, it stands in a record's body."""
    assert isinstance(column.type, String)
    return text.encode("utf-8", "replace").decode().replace("\0", "?")[: column.type.length]


# Times are whole seconds since 1970, in UTC. Lists are JSON.
tenants = Table(
    "tenants",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("weight", Float, nullable=False),
    Column("models", Text, nullable=False),  # patterns
    Column("cache_group", String(64)),
    Column("requests_per_minute", BigInteger),
    Column("tokens_per_minute", BigInteger),
    Column("concurrent_requests", BigInteger),
    Column("longest_prompt", BigInteger),
    Column("longest_answer", BigInteger),
    Column("monthly_tokens", BigInteger),
    Column("created_at", BigInteger, nullable=False),
    Column("removed_at", BigInteger),
)

keys = Table(
    "keys",
    metadata,
    Column("id", String(32), primary_key=True),  # its prefix, which may be shown
    Column("digest", LargeBinary(32), nullable=False),  # SHA-256 of the whole key
    Column("tenant", String(64), ForeignKey("tenants.name"), nullable=False, index=True),
    Column("role", String(16), nullable=False),
    Column("models", Text, nullable=False),  # patterns
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    Column("revoked_at", BigInteger),
)

# One row: grows by one whenever tenants or keys change, so that gateways see it in one small read.
revision = Table(
    "revision",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("number", BigInteger, nullable=False),
)

usage = Table(
    "usage",
    metadata,
    Column("day", String(10), primary_key=True),  # 2026-11-29, in UTC
    Column("tenant", String(64), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("model", String(255), primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),  # of these
    Column("cached_tokens", BigInteger, nullable=False),  # found in the cache
    Column("output_tokens", BigInteger, nullable=False),
)

# How far the journals of gateways (files on their hosts) are in here: what makes each record count once.
journals = Table(
    "journals",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("position", BigInteger, nullable=False),  # bytes of the file
    Column("updated_at", BigInteger, nullable=False),
)

# The audit log: each record's hash covers its body and the hash before. `at`, `kind`, `tenant` and `key` repeat what
# the body says, to find it by.
audit = Table(
    "audit",
    metadata,
    Column("seq", BigInteger, primary_key=True, autoincrement=False),  # from 1 on, without a gap
    Column("at", BigInteger, nullable=False),
    Column("kind", String(32), nullable=False),
    Column("tenant", String(64), nullable=False),
    Column("key", String(255), nullable=False),
    Column("body", LargeBinary, nullable=False),  # JSON
    Column("hash", LargeBinary(32), nullable=False),
    Index("ix_audit_tenant_at", "tenant", "at"),
    Index("ix_audit_at", "at"),
)

# What is kept of prompts and answers, encrypted. The record's body has its SHA-256.
contents = Table(
    "contents",
    metadata,
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("sealed", LargeBinary, nullable=False),
)

# One row: where the log ends, signed. `first`: the record that it begins with, those before being past their retention,
# and `anchor` the hash before that one. Before `erased` content may be missing.
audit_end = Table(
    "audit_end",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("seq", BigInteger, nullable=False),
    Column("at", BigInteger, nullable=False),
    Column("hash", LargeBinary(32), nullable=False),
    Column("first", BigInteger, nullable=False),
    Column("anchor", LargeBinary(32), nullable=False),
    Column("erased", BigInteger, nullable=False),
    Column("signature", LargeBinary(64), nullable=False),  # Ed25519
)
