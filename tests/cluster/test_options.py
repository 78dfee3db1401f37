"""docs/limits.md lists every option of every command, with what it may be. It is written by `make options-table`."""

import argparse
import math
import re
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import pytest
from quire.cli.config import (
    AdminConfig,
    ChatConfig,
    CompleteConfig,
    GovernanceConfig,
    LoadBalancerConfig,
    PlanConfig,
)
from quire.cli.main import _parser, read
from quire.cli.options import shown_default
from quire_cluster.config import MediaConfig, ServeConfig, StartConfig
from quire_cluster.deployment import DeploymentConfig
from quire_cluster.governance.callers import TenantConfig
from quire_engine.config import DEMO_MODEL, EngineConfig, allowed, kind_of
from quire_engine.errors import InvalidParameter

DOCUMENT = Path(__file__).parents[2] / "docs" / "limits.md"
TABLE = re.compile(r"(?<=^\| option \| of \| default \| what it may be \|\n\|---\|---\|---\|---\|\n)(^\|.*\n)*", re.M)
DEPLOYMENTS = re.compile(
    r"(?<=^\| of a deployment \| default \| what it may be \|\n\|---\|---\|---\|\n)(^\|.*\n)*", re.M
)
COMMANDS: dict[str, tuple[type, ...]] = {
    "serve": (ServeConfig, EngineConfig),
    "start": (StartConfig,),
    "load-balancer": (LoadBalancerConfig,),
    **dict.fromkeys(("deploy", "status", "scale", "drain", "delete", "why", "shutdown"), (AdminConfig,)),
    "plan": (PlanConfig, EngineConfig),
    "run-batch": (EngineConfig, MediaConfig),
    "chat": (ChatConfig,),
    "complete": (CompleteConfig,),
    **dict.fromkeys(("tenants add", "tenants set"), (GovernanceConfig, TenantConfig)),
    **dict.fromkeys(
        (
            *("tenants remove", "tenants list", "keys create", "keys rotate", "keys revoke", "keys list", "usage"),
            *("audit list", "audit verify", "audit export", "audit checkpoint"),
        ),
        (GovernanceConfig,),
    ),
}
OPTIONS = [
    pytest.param(config, f, id=f"{config.__name__}.{f.name}")
    for config in (
        ServeConfig,
        StartConfig,
        AdminConfig,
        LoadBalancerConfig,
        DeploymentConfig,
        EngineConfig,
        PlanConfig,
        ChatConfig,
        CompleteConfig,
        GovernanceConfig,
        TenantConfig,
    )
    for f in fields(config)
    if f.default is not MISSING
]
MODEL = "a checkpoint folder, a .gguf file, a model package, a hub id"
OTHERS = {  # what a command takes besides the fields of its configurations
    ("`MODEL`", DEMO_MODEL, MODEL): ["serve", "plan"],
    ("`--model`", DEMO_MODEL, MODEL): ["run-batch"],
    ("`--config`", "none", "a YAML file of options; the command line goes before it"): ["serve"],
    ("`INPUT`", "must be given", "a file in OpenAI's batch format"): ["run-batch"],
    ("`-o`, `--output`", "must be given", "a file; what has a result in it is not run again"): ["run-batch"],
    ("`PROMPT`", "a conversation", "text"): ["chat"],
    ("`PROMPT`", "must be given", "text"): ["complete"],
    ("`FILE`", "must be given", "a YAML file of names of models, each with its options"): ["deploy"],
    ("`--watch`", "false", "true or false: again every second"): ["status"],
    ("`KIND`", "must be given", "one of haproxy, nginx, envoy"): ["load-balancer"],
    ("`--watch`", "false", "true or false: go on, and write it anew when gateways come and go"): ["load-balancer"],
    ("`--json`", "false", "true or false: all of it, for programs"): ["status"],
    ("`NAME`", "must be given", "the name of a deployment"): ["scale", "delete"],
    ("`REPLICAS`", "must be given", "a whole number from 0 to 4096, or auto: as the load asks for"): ["scale"],
    ("`WHAT`", "must be given", "a node's address, name or id, or a replica as NAME/NUMBER"): ["drain"],
    ("`REQUEST`", "all that wait", "the id of a request"): ["why"],
    ("`NAME`", "must be given", "the name of a tenant"): ["tenants add", "tenants set", "tenants remove"],
    ("`TENANT`", "must be given", "the name of a tenant"): ["keys create"],
    ("`ID`", "must be given", "of a key, as qk-1a2b3c4d"): ["keys rotate", "keys revoke"],
    ("`--role`", "user", "user, auditor or admin"): ["keys create"],
    ("`--models`", "*", "patterns of names, of its tenant's models (separated by commas)"): ["keys create"],
    ("`--expires`", "never", "a time, as 90d, 12h or 30m"): ["keys create"],
    ("`--overlap`", "24h", "a time, as 90d, 12h or 30m, that the old key is good yet"): ["keys rotate"],
    ("`--json`", "false", "true or false: for programs"): ["tenants list", "keys list", "usage", "audit list"],
    ("`--csv`", "false", "true or false: for tables"): ["tenants list", "keys list", "usage", "audit list"],
    ("`--tenant`", "all", "the name of a tenant"): ["keys list", "usage", "audit list"],
    ("`--key`", "all", "the id of a key"): ["usage"],
    ("`--model`", "all", "the name of a deployment"): ["usage"],
    ("`--since`", "the first", "a day, as 2026-11-01, in UTC"): ["usage"],
    ("`--until`", "the last", "a day, as 2026-11-30, in UTC"): ["usage"],
    ("`--by`", "tenant", "tenant, day, key or model"): ["usage"],
    ("`--kind`", "all", "request, refused or admin"): ["audit list"],
    ("`--limit`", "50", "a whole number of records"): ["audit list"],
    ("`--export`", "the database", "a file that `quire audit export` wrote"): ["audit verify"],
    ("`--checkpoint`", "none", "a file that `quire audit checkpoint` wrote, kept elsewhere"): ["audit verify"],
    ("`--key`", "governance's", "a file with the signing key, or its public half, in PEM"): ["audit verify"],
    ("`-o`, `--output`", "the terminal", "a file that is not there yet"): ["audit export"],
}


def parsers(parser: argparse.ArgumentParser | None = None, before: str = "") -> dict[str, argparse.ArgumentParser]:
    """Of every command, and of the commands of a command."""
    found: dict[str, argparse.ArgumentParser] = {}
    groups = [one for one in (parser or _parser())._actions if isinstance(one, argparse._SubParsersAction)]
    for name, command in (groups[0].choices if groups else {}).items():
        found |= parsers(command, f"{before}{name} ") or {before + name: command}
    return found


def flags(action: argparse.Action) -> str:
    """As the table has them; a positional argument in capitals."""
    shown = [name for name in action.option_strings if not name.startswith("--no-")]
    return ", ".join(f"`{name}`" for name in shown) or f"`{action.dest.upper()}`"


def rows() -> dict[tuple[str, str, str], list[str]]:
    """(option, default, what it may be) → commands, from the parsers of the command line and the configurations."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for command, parser in parsers().items():
        described = {
            f.name: (shown_default(f), allowed(kind_of(typing.get_type_hints(config)[f.name]), f.metadata))
            for config in COMMANDS[command]
            for f in fields(config)
            if f.default is not MISSING
        }
        for action in parser._actions:
            if isinstance(action, argparse._HelpAction):
                continue
            names = flags(action)
            if action.dest in described:
                found.setdefault((names, *described[action.dest]), []).append(command)
            else:
                [other] = [row for row, commands in OTHERS.items() if row[0] == names and command in commands]
                found.setdefault(other, []).append(command)
    return found


def test_every_option_is_in_the_table(request: pytest.FixtureRequest) -> None:
    assert parsers().keys() == COMMANDS.keys()
    found = rows()
    assert {row: found.get(row) for row in OTHERS} == OTHERS
    table = "".join(
        f"| {names} | {', '.join(f'`{command}`' for command in commands)} | {default} | {may_be} |\n"
        for (names, default, may_be), commands in found.items()
    )
    text = DOCUMENT.read_text()
    if request.config.getoption("--write-tables"):
        text = TABLE.sub(lambda _: table, text)
        DOCUMENT.write_text(text)
    written = TABLE.search(text)
    assert written is not None
    assert written[0] == table, "run make options-table"


def test_every_option_of_a_deployment_is_in_the_table(request: pytest.FixtureRequest) -> None:
    kinds = typing.get_type_hints(DeploymentConfig)
    table = "".join(
        f"| `{f.name}` | {shown_default(f)} | {allowed(kind_of(kinds[f.name]), f.metadata)} |\n"
        for f in fields(DeploymentConfig)
    )
    table += "| `chat_template` | the model's own | a file with a chat template, beside this one |\n"
    text = DOCUMENT.read_text()
    if request.config.getoption("--write-tables"):
        text = DEPLOYMENTS.sub(lambda _: table, text)
        DOCUMENT.write_text(text)
    written = DEPLOYMENTS.search(text)
    assert written is not None
    assert written[0] == table, "run make options-table"


GOOD = {  # which not any text is
    "allowed_origins": "https://example.org",
    "allowed_local_media_path": "/text",
    "limit_mm_per_prompt": '{"image": 2}',
    "speculative_config": '{"method": "ngram", "num_speculative_tokens": 5}',
}


def values(f: Field[Any], kind: type) -> Iterator[tuple[Any, bool]]:
    """What is just allowed and what is just not."""
    if kind is bool:
        yield from ((True, True), (False, True), ("true", False), (1, False))
        return
    if kind is str:
        choices = f.metadata["choices"]
        yield from ((choice, True) for choice in choices or (GOOD.get(f.name, "text"),))
        yield from (("", False), ("a\0", False), ("\ud800", False), (5, False))
        if choices:
            yield "none of these", False
        return
    above, least, most = (f.metadata[name] for name in ("above", "least", "most"))
    step = 1 if kind is int else 1e-6
    yield from ((most, True), (most + step if most < 2**60 else most * 2, False))
    yield from ((math.nan, False), (math.inf, False), (-math.inf, False), ("5", False), (True, False))
    yield from (
        ((least, True), (least - step if least > -(2**60) else least * 2, False))
        if above == -math.inf
        else (
            (above + step, True),
            (above, False),
        )
    )


@pytest.mark.parametrize(("config", "f"), OPTIONS)
def test_an_option_is_what_the_table_says(config: type, f: Field[Any]) -> None:
    """Every other value is refused with the words of the table."""
    hint = typing.get_type_hints(config)[f.name]
    kind = kind_of(hint)
    given = {"model": "m"} if config is EngineConfig else {}
    assert (f.default is None) <= bool(f.metadata["unset"]), "the table says what happens without it"
    for value, good in values(f, kind):
        if good:
            assert getattr(config(**(given | {f.name: value})), f.name) == value
        else:
            with pytest.raises(InvalidParameter) as refused:
                config(**(given | {f.name: value}))
            assert str(refused.value).endswith(f"; it must be {allowed(kind, f.metadata)}")
            assert refused.value.parameter == f.name


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        ("--port x", "port is 'x'; it must be a whole number from 0 to 65535"),
        ("--port 1.5", "port is '1.5'; it must be a whole number from 0 to 65535"),
        ("--body-timeout soon", "body_timeout is 'soon'; it must be a number of seconds from 0.1 to 86400"),
        ("--device tpu", "device is 'tpu'; it must be one of auto, cpu, cuda"),
    ],
)
def test_what_is_no_number_or_no_choice_is_said_as_all_else(arguments: str, wrong: str) -> None:
    with pytest.raises(InvalidParameter) as refused:
        read(["serve", *arguments.split()])
    assert str(refused.value) == wrong


@pytest.mark.parametrize(
    ("option", "entry", "mend"),
    [
        ("allowed_hosts", "example.org:8000", "no port"),
        ("allowed_hosts", "*.example.org", "no pattern"),
        ("allowed_hosts", "https://example.org", "names alone"),
        ("allowed_hosts", '["example.org"]', "names alone"),
        ("allowed_origins", '["https://example.org"]', "as https://example.org"),
        ("allowed_origins", "example.org", "with its scheme"),
        ("allowed_origins", "https://example.org/", "without a path"),
        ("allowed_origins", "https://Example.org", "in lower case"),
    ],
)
def test_a_name_or_a_site_that_no_client_could_send_is_refused(option: str, entry: str, mend: str) -> None:
    for given in (entry, f"good.example, {entry}" if option == "allowed_hosts" else f"null, {entry}"):
        with pytest.raises(InvalidParameter, match=f"{option} holds '{re.escape(entry)}'; .*{mend}") as refused:
            ServeConfig(**{option: given})
        assert refused.value.parameter == option


def test_names_and_sites_that_clients_send() -> None:
    ServeConfig(
        allowed_hosts="[::2], Models.example, 10.0.0.7,::1,my_host", allowed_origins="*,null,http://[::1]:80,app://x.y"
    )
