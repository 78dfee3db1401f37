"""`quire tenants` and `quire keys`, as an operator types them."""

import asyncio
import csv
import io
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from cryptography.hazmat.primitives import serialization
from quire.cli.main import main
from quire_cluster.governance.chain import public_key_of
from quire_cluster.governance.config import read_governance
from quire_cluster.governance.database import Database
from quire_cluster.governance.records import Record, UsageDelta
from quire_cluster.governance.tables import metadata
from quire_cluster.governance.usage import add
from quire_engine.errors import InvalidParameter
from sqlalchemy import text


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands are called; it has an empty governance.yaml."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUIRE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("QUIRE_GOVERNANCE", raising=False)
    (tmp_path / "governance.yaml").touch()
    return tmp_path


def quire(capsys: pytest.CaptureFixture[str], line: str, code: int = 0) -> str:
    """What a command says: to the terminal, or where it fails why."""
    assert main(line.split()) == code
    said = capsys.readouterr()
    return said.out if code == 0 else said.err


def listed(capsys: pytest.CaptureFixture[str], what: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(quire(capsys, f"{what} list --json"))
    return found


def test_a_tenant_is_made_changed_and_ended(capsys: pytest.CaptureFixture[str]) -> None:
    assert "as `quire tenants add` does" in quire(capsys, "tenants list", 1)
    quire(capsys, "tenants add research --weight 2 --tokens-per-minute 200000 --models qwen3-*,llama")
    quire(capsys, "tenants add other --cache-group g")
    wanted = {
        "name": "research",
        "weight": 2.0,
        "models": ["qwen3-*", "llama"],
        "requests_per_minute": None,
        "tokens_per_minute": 200000,
        "concurrent_requests": None,
        "longest_prompt": None,
        "longest_answer": None,
        "monthly_tokens": None,
        "cache_group": None,
    }
    assert listed(capsys, "tenants")[1] == wanted
    assert "there is a tenant research" in quire(capsys, "tenants add research", 1)
    quire(capsys, "tenants set research --monthly-tokens 50000000 --tokens-per-minute none --cache-group g")
    wanted |= {"monthly_tokens": 50000000, "tokens_per_minute": None, "cache_group": "g"}
    assert listed(capsys, "tenants")[1] == wanted
    quire(capsys, "tenants set research --cache-group none")
    assert listed(capsys, "tenants")[1] == wanted | {"cache_group": None}
    assert "nothing is given" in quire(capsys, "tenants set research", 1)
    assert "there is no tenant 'nobody'" in quire(capsys, "tenants set nobody --weight 2", 1)
    assert "requests_per_minute is 0" in quire(capsys, "tenants set research --requests-per-minute 0", 1)
    assert "research" in quire(capsys, "tenants list")
    rows = list(csv.DictReader(io.StringIO(quire(capsys, "tenants list --csv"))))
    assert [row["name"] for row in rows] == ["other", "research"]
    quire(capsys, "tenants remove other")
    assert [one["name"] for one in listed(capsys, "tenants")] == ["research"]
    quire(capsys, "tenants add other")
    assert listed(capsys, "tenants")[0]["cache_group"] is None, "it is another one"


def test_a_key_is_shown_once(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    quire(capsys, "tenants add other")
    assert "there is no tenant 'research'" in quire(capsys, "keys create research", 1)
    quire(capsys, "tenants add research")
    assert (folder / "governance.db").stat().st_mode & 0o077 == 0
    said = quire(capsys, "keys create research --role admin --expires 90d --models a*,b")
    key = said.split()[0]
    assert key.startswith("qk-") and len(key) > 50
    [shown] = listed(capsys, "keys")
    assert (shown["id"], shown["role"], shown["models"], shown["state"]) == (key[:11], "admin", ["a*", "b"], "good")
    stored = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert key.encode() not in stored and key[12:].encode() not in stored
    assert key[12:] not in quire(capsys, "keys list")
    other = quire(capsys, f"keys rotate {key[:11]} --overlap 1h").split("\n")[1].split()[0]
    quire(capsys, f"keys revoke {other[:11]}")
    assert {one["id"]: one["state"] for one in listed(capsys, "keys")} == {key[:11]: "good", other[:11]: "revoked"}
    for line, wrong in (
        ("keys create research --role boss", "role is 'boss'; it must be one of user, auditor, admin"),
        ("keys create research --expires soon", "give a time as 90d, 12h or 30m"),
        ("keys create research --expires 0d", "give a time as 90d, 12h or 30m"),
        ("keys create research --expires 999999w", "expires is 999999w; at most 36500d are kept"),
        ("keys create research --models ,", "models is ','"),
        ("keys revoke qk-00000000", "there is no key 'qk-00000000'"),
        (f"keys revoke {other[:11]}", "is revoked already"),
        (f"keys rotate {other[:11]}", "is revoked; create a new key instead"),
    ):
        assert wrong in quire(capsys, line, 1), line


def test_the_audit_log_says_what_was_changed(capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever asks which tenant ended, or which key, finds it on record."""
    quire(capsys, "tenants add research --weight 2")
    quire(capsys, "tenants set research --weight 4")
    key = quire(capsys, "keys create research").split()[0][:11]
    other = quire(capsys, f"keys rotate {key} --overlap 1h").split("\n")[1].split()[0][:11]
    quire(capsys, f"keys revoke {key}")
    quire(capsys, "tenants remove research")
    found = {one["action"]: one for one in listed(capsys, "audit")}
    assert {one["key"].partition(":")[0] for one in found.values()} == {"operator"}
    added = found["tenant.add"]["made"]
    assert (added["name"], added["weight"]) == ("research", 2)
    changed = found["tenant.change"]
    assert (changed["before"], changed["after"]) == (added, added | {"weight": 4})
    assert found["tenant.remove"]["removed"] == "research"
    assert found["key.create"]["made"]["id"] == key
    assert (found["key.rotate"]["rotated"], found["key.rotate"]["made"]["id"]) == (key, other)
    assert (found["key.revoke"]["revoked"], found["key.revoke"]["of"]) == (key, "research")


def test_where_governance_is_looked_for(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quire(capsys, "tenants add here")
    for place in ("named", "home", "other"):
        (folder / place).mkdir()
        (folder / place / "governance.yaml").write_text("database: sqlite:///mine.db\n")
    quire(capsys, "tenants add named --governance named/governance.yaml")
    assert (folder / "named/mine.db").exists(), "beside the file"
    monkeypatch.setenv("QUIRE_GOVERNANCE", str(folder / "other/governance.yaml"))
    quire(capsys, "tenants add other")
    assert [one["name"] for one in listed(capsys, "tenants")] == ["other"]
    monkeypatch.delenv("QUIRE_GOVERNANCE")
    assert [one["name"] for one in listed(capsys, "tenants")] == ["here"]
    (folder / "governance.yaml").unlink()
    quire(capsys, "tenants add home")
    assert (folder / "home/mine.db").exists()
    (folder / "home/governance.yaml").unlink()
    assert "give --governance FILE" in quire(capsys, "tenants list", 1)
    assert "is no file" in quire(capsys, "tenants list --governance nowhere.yaml", 1)


@pytest.mark.parametrize(
    ("written", "wrong"),
    [
        ("databse: x", "databse: Extra inputs are not permitted"),
        ("grace: -1", "grace"),
        ("database: mysql://a/b", "mysql is not supported; give sqlite:///FILE or postgresql://"),
        ("database: nonsense", "no address of a database"),
        ("database: 'sqlite://'", "SQLite needs a file"),
        ("[1, 2]", "governance.yaml"),
        ("a: !!python/object/apply:os.system ['true']", "cannot be read"),
        ("audit: {signing_key: governance.yaml}", "audit.signing_key"),
        ("audit: {signing_key: missing/key.pem}", "cannot be written"),
        ("audit: {content_key: missing}", "audit.content_key"),
        ("audit: {content_key: governance.yaml}", "audit.content_key"),
        ("policies: []\naudit: {days: 3}\npolicies: []\n", "line 3 has policies for the second time"),
        ("audit: {days: 3, days: 4}", "has days for the second time"),
        (
            "clients: [{name: a, tenant: t}, {name: b, tenant: t}, {name: a, tenant: other}]",
            "clients: 'a' is there twice",
        ),
        ("database: postgresql://quire:${QUIRE_NO_SUCH}@host/db", "the environment has no QUIRE_NO_SUCH; set it"),
    ],
)
def test_what_is_no_governance(capsys: pytest.CaptureFixture[str], folder: Path, written: str, wrong: str) -> None:
    (folder / "governance.yaml").write_text(written)
    assert wrong in quire(capsys, "tenants list", 1)


def test_the_signing_key_is_its_owner_s(folder: Path) -> None:
    first = read_governance(folder / "governance.yaml")
    assert (folder / "audit-key.pem").stat().st_mode & 0o077 == 0
    assert read_governance(folder / "governance.yaml") == first
    assert "PRIVATE" not in repr(first)


def test_migrations_make_the_tables_that_are_used(folder: Path) -> None:
    async def run() -> None:
        database = Database(f"sqlite:///{folder / 'fresh.db'}")
        await database.migrate()
        await database.migrate()
        async with database.transaction() as connection:
            differences = await connection.run_sync(
                lambda c: compare_metadata(MigrationContext.configure(c, opts={"compare_type": True}), metadata)
            )
            assert differences == []
            await connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        with pytest.raises(InvalidParameter, match="another version of Quire"):
            await database.migrate()
        await database.close()

    asyncio.run(run())


def test_the_audit_log_is_looked_through(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    for line in ("audit list", "audit verify", "audit checkpoint", "audit export", "usage", "keys list"):
        assert "nothing was made in it" in quire(capsys, line, 1)
    assert not (folder / "governance.db").exists(), "who only looks makes none"
    quire(capsys, "tenants add a")
    quire(capsys, "tenants add b")
    (folder / "kept.json").write_text(quire(capsys, "audit checkpoint"))
    quire(capsys, "tenants remove a")
    shown = json.loads(quire(capsys, "audit list --json --limit 2"))
    assert [(one["seq"], one["action"]) for one in shown] == [(3, "tenant.remove"), (2, "tenant.add")]
    assert shown[0]["key"].startswith("operator:")
    assert "tenant.remove" in quire(capsys, "audit list --kind admin")
    assert "tenant.remove" in quire(capsys, "audit list --csv")
    assert "nothing is on record" in quire(capsys, "audit list --kind request")
    for line in ("audit verify", "audit verify --checkpoint kept.json", "audit verify --key audit-key.pem"):
        assert "intact: records 1 to 3" in quire(capsys, line)
    quire(capsys, "audit export -o log.jsonl")
    assert len(quire(capsys, "audit export").splitlines()) == 4
    assert "cannot be written" in quire(capsys, "audit export -o log.jsonl", 1), "nothing is written over"
    assert "intact" in quire(capsys, "audit verify --export log.jsonl --checkpoint kept.json")
    public = read_governance(folder / "governance.yaml").signing_key
    (folder / "public.pem").write_bytes(
        public_key_of(public).public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    assert "intact" in quire(capsys, "audit verify --export log.jsonl --key public.pem")
    changed = (folder / "log.jsonl").read_text().replace("tenant.remove", "tenant.Remove")
    (folder / "log.jsonl").write_text(changed)
    assert "record 3 was changed" in quire(capsys, "audit verify --export log.jsonl", 1)
    with sqlite3.connect(folder / "governance.db") as connection:
        connection.execute("DELETE FROM audit WHERE seq = 2")
    assert "record 2 is missing" in quire(capsys, "audit verify", 1)
    (folder / "deep.json").write_text("[" * 100_000)
    for line, wrong in (
        ("audit list --limit -1", "limit is -1; give a number of records"),
        ("audit list --limit 99999999999999999999", "limit is 99999999999999999999; give a number of records"),
        ("audit verify --checkpoint governance.yaml", "the checkpoint is none"),
        ("audit verify --checkpoint deep.json", "the checkpoint is none"),
        ("audit verify --key governance.yaml", "neither a private nor a public one"),
        ("audit verify --export nowhere", "cannot be read"),
    ):
        assert wrong in quire(capsys, line, 1), line


def test_usage_is_summed(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    quire(capsys, "tenants add t0")
    assert "nothing was used" in quire(capsys, "usage")

    async def use() -> None:
        database = Database(f"sqlite:///{folder / 'governance.db'}")
        async with database.transaction() as connection:
            for number in range(12):
                used = UsageDelta(model=f"m{number % 2}", prompt_tokens=number, cached_tokens=1, output_tokens=10)
                at = 1_790_000_000 + 86400 * (number // 4)
                one = Record(kind="request", at=at, tenant=f"t{number % 3}", key="k", body={}, usage=used)
                await add(database, connection, [one])
        await database.close()

    asyncio.run(use())
    rows = json.loads(quire(capsys, "usage --by day --json"))
    assert [(row["day"], row["requests"], row["prompt_tokens"]) for row in rows] == [
        ("2026-09-21", 4, 6),
        ("2026-09-22", 4, 22),
        ("2026-09-23", 4, 38),
    ]
    [row] = json.loads(quire(capsys, "usage --tenant t1 --since 2026-09-22 --until 2026-09-22 --json"))
    assert row == {"tenant": "t1", "requests": 2, "prompt_tokens": 11, "cached_tokens": 2, "output_tokens": 20}
    assert [row["model"] for row in csv.DictReader(io.StringIO(quire(capsys, "usage --by model --csv")))] == [
        "m0",
        "m1",
    ]
    assert "by is 'hour'" in quire(capsys, "usage --by hour", 1)
    assert "since is 'soon'" in quire(capsys, "usage --since soon", 1)
