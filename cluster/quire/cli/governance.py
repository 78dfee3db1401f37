"""`quire tenants`, `keys`, `usage`, `audit`: what an operator who may read governance.yaml does, right on the
database."""

import argparse
import asyncio
import csv
import getpass
import io
import json
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from quire_cluster.governance.administration import Actor, Administration, KeyFacts
from quire_cluster.governance.callers import Tenant, TenantConfig, patterns
from quire_cluster.governance.chain import AuditLog, Checkpoint, public_key_of, verify_export
from quire_cluster.governance.config import find_file, read_governance
from quire_cluster.governance.database import Database
from quire_cluster.governance.usage import UsageRow, query
from quire_engine.errors import InvalidParameter, ServerError
from rich.console import Console
from rich.table import Table

from quire.cli.config import GovernanceConfig
from quire.cli.options import names_of
from quire.cli.terminal import say

T = TypeVar("T")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_LONGEST = 100 * 365 * 86400  # seconds; far from the years that calendars have no room for
_FORM = re.compile(r"(\d{1,6})([smhdw])")


@dataclass(frozen=True)
class _Opened:
    """What works on the database, and for whom."""

    database: Database
    administration: Administration
    log: AuditLog
    actor: Actor


def _with_database(config: GovernanceConfig, work: Callable[[_Opened], Awaitable[T]], *, makes: bool = False) -> T:
    """Does something with it, brought to this version where need be. `makes`: where there is none, too. Raises
    InvalidParameter."""
    governance = read_governance(find_file(config.governance))

    async def run() -> T:
        database = Database(governance.database)
        if database.file is not None and not makes and not database.file.exists():
            raise InvalidParameter(
                f"there is no {database.file}: nothing was made in it, as `quire tenants add` does, or it was moved",
                "governance",
            )
        try:
            await database.migrate()
            log = AuditLog(database, governance.signing_key, governance.content_key)
            actor = Actor(key=f"operator:{getpass.getuser()}")
            return await work(_Opened(database, Administration(database, log), log, actor))
        finally:
            await database.close()

    return asyncio.run(run())


def seconds(text: str, parameter: str) -> int:
    """Of 90d, 12h, 30m. Raises InvalidParameter."""
    found = _FORM.fullmatch(text)
    if not found or not int(found[1]):
        raise InvalidParameter(f"{parameter} is {text!r:.80}; give a time as 90d, 12h or 30m", parameter)
    if (long := int(found[1]) * _UNITS[found[2]]) > _LONGEST:
        raise InvalidParameter(f"{parameter} is {text}; at most {_LONGEST // 86400}d are kept", parameter)
    return long


# ---- tenants --------------------------------------------------------------------------------------------------------


def add_tenant(arguments: argparse.Namespace, config: GovernanceConfig, tenant: TenantConfig) -> None:
    """`quire tenants add`"""
    made = tenant.tenant(arguments.name)
    _with_database(config, lambda opened: opened.administration.add_tenant(made, opened.actor), makes=True)
    say(f"{made.name} is a tenant; `quire keys create {made.name}` makes it a key")


def set_tenant(arguments: argparse.Namespace, config: GovernanceConfig, tenant: TenantConfig) -> None:
    """`quire tenants set`: what is given changes, and all else stays."""
    given = {name: value for name, value in vars(arguments).items() if name in names_of([TenantConfig])}
    if not given:
        raise InvalidParameter("nothing is given that would change", "name")

    _with_database(config, lambda opened: opened.administration.change_tenant(arguments.name, given, opened.actor))
    say(f"{arguments.name} is changed; gateways go by it within seconds")


def remove_tenant(arguments: argparse.Namespace, config: GovernanceConfig) -> None:
    """`quire tenants remove`"""
    _with_database(config, lambda opened: opened.administration.remove_tenant(arguments.name, opened.actor))
    say(f"{arguments.name} is a tenant no more, and its keys are revoked; its usage and its records stay")


def list_tenants(arguments: argparse.Namespace, config: GovernanceConfig) -> None:
    """`quire tenants list`"""
    tenants = _with_database(config, lambda opened: opened.administration.tenants())
    _show(
        [_of_tenant(one) for one in tenants], arguments, empty="there is no tenant; `quire tenants add NAME` makes one"
    )


def _of_tenant(tenant: Tenant) -> dict[str, Any]:
    limits = asdict(tenant.limits)
    return (
        {"name": tenant.name, "weight": tenant.weight, "models": list(tenant.models)}
        | limits
        | {"cache_group": tenant.cache_group}
    )


# ---- keys -----------------------------------------------------------------------------------------------------------


def create_key(arguments: argparse.Namespace, config: GovernanceConfig) -> None:
    """`quire keys create`"""
    lives = seconds(arguments.expires, "expires") if arguments.expires is not None else None
    models = patterns(arguments.models)
    facts, key = _with_database(
        config,
        lambda opened: opened.administration.create_key(
            arguments.tenant, opened.actor, role=arguments.role, models=models, lives=lives
        ),
    )
    _say_key(facts, key)


def rotate_key(arguments: argparse.Namespace, config: GovernanceConfig) -> None:
    """`quire keys rotate`"""
    overlap = seconds(arguments.overlap, "overlap")
    facts, key = _with_database(
        config, lambda opened: opened.administration.rotate_key(arguments.id, opened.actor, overlap=overlap)
    )
    say(f"{arguments.id} is good for {arguments.overlap} more; in its place:")
    _say_key(facts, key)


def _say_key(facts: KeyFacts, key: str) -> None:
    until = f", good until {_time(facts.expires_at)}" if facts.expires_at is not None else ""
    say(f"{key}\n\nof {facts.tenant}, as {facts.role}{until}. It is shown this once: nobody keeps it but you.")


def revoke_key(arguments: argparse.Namespace, config: GovernanceConfig) -> None:
    """`quire keys revoke`"""
    _with_database(config, lambda opened: opened.administration.revoke_key(arguments.id, opened.actor))
    say(f"{arguments.id} is revoked; gateways refuse it within seconds")


def list_keys(arguments: argparse.Namespace, config: GovernanceConfig) -> None:
    """`quire keys list`"""
    keys = _with_database(config, lambda opened: opened.administration.keys(arguments.tenant))
    now = time.time()
    rows = [
        {
            "id": one.id,
            "tenant": one.tenant,
            "role": one.role,
            "models": list(one.models),
            "state": one.state(now),
            "created_at": _time(one.created_at),
            "expires_at": _time(one.expires_at),
            "revoked_at": _time(one.revoked_at),
        }
        for one in keys
    ]
    _show(rows, arguments, empty="there is no key; `quire keys create TENANT` makes one")


def _time(at: int | None) -> str | None:
    return None if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# ---- usage and the audit log ----------------------------------------------------------------------------------------


def show_usage(arguments: argparse.Namespace, config: GovernanceConfig) -> None:
    """`quire usage`"""

    async def work(opened: _Opened) -> list[UsageRow]:
        async with opened.database.snapshot() as connection:
            return await query(
                connection,
                tenant=arguments.tenant,
                key=arguments.key,
                model=arguments.model,
                since=arguments.since,
                until=arguments.until,
                by=arguments.by,
            )

    found = [asdict(row) for row in _with_database(config, work)]
    rows = [{arguments.by: row["of"]} | {name: row[name] for name in row if name != "of"} for row in found]
    _show(rows, arguments, empty="nothing was used")


def list_audit(arguments: argparse.Namespace, config: GovernanceConfig) -> None:
    """`quire audit list`: the newest first."""
    entries = _with_database(
        config, lambda opened: opened.log.list(tenant=arguments.tenant, kind=arguments.kind, limit=arguments.limit)
    )
    rows = [{"seq": entry.seq} | entry.values for entry in entries]
    if not arguments.json:
        rows = [_of_entry(row) for row in rows]
    _show(rows, arguments, empty="nothing is on record")


def _of_entry(values: dict[str, Any]) -> dict[str, Any]:
    """What a record has in common with others, and the rest in one."""
    shown = {name: values.pop(name) for name in ("seq", "at", "kind", "tenant", "key")}
    return shown | {"at": _time(shown["at"]), "what": json.dumps(values, sort_keys=True)}


def verify_audit(arguments: argparse.Namespace, config: GovernanceConfig) -> None:
    """`quire audit verify`: of the database, or of a file that was exported. Raises ServerError where something is
    wrong."""
    known = Checkpoint.from_line(_read(arguments.checkpoint)) if arguments.checkpoint is not None else None
    key = public_key_of(_read(arguments.key).encode()) if arguments.key is not None else None
    if arguments.export is not None:
        if key is None:
            key = public_key_of(read_governance(find_file(config.governance)).signing_key)
        try:
            with open(arguments.export, encoding="utf-8") as lines:
                report = verify_export(lines, key, known)
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidParameter(f"--export {arguments.export} cannot be read: {error}", "export") from error
    else:
        report = _with_database(config, lambda opened: opened.log.verify(known, key))
    if report.fault is not None:
        raise ServerError(f"the audit log is not what was written: {report.fault}")
    if report.end is None:
        say("nothing is on record")
        return
    say(
        f"intact: records {report.end.first} to {report.end.seq}, each as it was written, the end signed at "
        f"{_time(report.end.at)}"
    )


def export_audit(arguments: argparse.Namespace, config: GovernanceConfig) -> None:
    """`quire audit export`: the signed end, and every record, as lines of JSON."""

    async def work(opened: _Opened) -> None:
        if arguments.output is None:
            async for line in opened.log.export():
                say(line)
            return
        try:
            with open(arguments.output, "x", encoding="utf-8", errors="surrogatepass") as file:
                async for line in opened.log.export():
                    file.write(line + "\n")
        except OSError as error:
            raise InvalidParameter(f"--output {arguments.output} cannot be written: {error}", "output") from error

    _with_database(config, work)


def checkpoint_audit(arguments: argparse.Namespace, config: GovernanceConfig) -> None:
    """`quire audit checkpoint`"""
    end = _with_database(config, lambda opened: opened.log.checkpoint())
    if end is None:
        raise InvalidParameter("nothing is on record yet")
    say(end.to_line())


def _read(path: str) -> str:
    try:
        return Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidParameter(f"{path} cannot be read: {error}") from error


# ---- what is shown --------------------------------------------------------------------------------------------------


def _show(rows: Sequence[dict[str, Any]], arguments: argparse.Namespace, *, empty: str) -> None:
    """As a table; for programs as JSON or CSV."""
    if arguments.json:
        say(json.dumps(list(rows), indent=2))
        return
    if arguments.csv:
        written = io.StringIO()
        if rows:
            writer = csv.DictWriter(written, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
        say(written.getvalue(), end="")
        return
    if not rows:
        say(empty)
        return
    shown = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    table = Table(*(name.replace("_", " ") for name in shown), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(_cell(row[name]) for name in shown))
    written = io.StringIO()
    Console(file=written, width=1 << 14, highlight=False, markup=False).print(table)
    say("\n".join(line.rstrip() for line in written.getvalue().splitlines()))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return ", ".join(value) if isinstance(value, list) else f"{value:g}" if isinstance(value, float) else str(value)
