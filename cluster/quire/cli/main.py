"""The command line: `quire serve`; `start`, `deploy`, `status` and the other operators' commands; `tenants`, `keys`,
`usage`, `audit`; `chat`, `complete`, `run-batch`, `plan`.

What a command takes is read and checked before what it needs is imported: torch and Ray take seconds.
"""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from quire_cluster.addresses import with_port
from quire_cluster.config import GatewayConfig, MediaConfig, ServeConfig, StartConfig
from quire_cluster.governance.callers import TenantConfig
from quire_engine.config import DEMO_MODEL, EngineConfig
from quire_engine.errors import InvalidParameter, QuireError

from quire.cli.config import (
    AdminConfig,
    ChatConfig,
    CompleteConfig,
    GovernanceConfig,
    LoadBalancerConfig,
    PlanConfig,
)
from quire.cli.options import add_options, build, names_of, read_config_file
from quire.cli.terminal import flush, prepare, say

_ANY_PORT = "any port: see `quire status`"
_INTERRUPTED, _BROKEN_PIPE = 130, 141  # as shells say that a signal ended a program: 128 + its number


class _Command(Protocol):
    """Adds a command."""

    def __call__(
        self, name: str, run: Callable[..., None], help: str, description: str, *configs: type
    ) -> argparse.ArgumentParser: ...


def _commands(parser: argparse.ArgumentParser) -> _Command:
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[..., None], help: str, description: str, *configs: type
    ) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = commands.add_parser(name, help=help, description=description)
        made.set_defaults(run=run, configs=configs)
        for config in configs:
            add_options(made, config)
        return made

    return command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="quire", description="A serving cluster for open large language models.")
    command = _commands(parser)

    serve = command("serve", _serve, "serve a model over HTTP and gRPC", "Serve a model.", ServeConfig, EngineConfig)
    _model_argument(serve)
    serve.add_argument(
        "--config",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="YAML file with options; the command line goes before it",
    )

    command(
        "start",
        _start,
        "start a cluster in a running Ray cluster",
        "Start a controller and gateways in a running Ray cluster; they stay when this command has ended.",
        StartConfig,
    )
    deploy = command(
        "deploy", _deploy, "serve the models of a file", "Make what a file says what is served.", AdminConfig
    )
    deploy.add_argument("file", help="YAML: names of models, each with its options (see deploy/models.yaml)")
    status = command("status", _status, "how a cluster is", "Deployments, replicas, gateways, nodes.", AdminConfig)
    status.add_argument("--watch", action="store_true", help="again every second")
    status.add_argument("--json", action="store_true", help="all of it, for programs")
    scale = command("scale", _scale, "so many replicas of a model", "Set how many replicas a model has.", AdminConfig)
    scale.add_argument("name", help="of the deployment")
    scale.add_argument("replicas", help="how many, whatever the load; auto: as the load asks for")
    drain = command(
        "drain",
        _drain,
        "end a replica, or all of a node",
        "What runs there finishes; what is new goes on elsewhere.",
        AdminConfig,
    )
    drain.add_argument("what", metavar="NODE|REPLICA", help="a node's address or id, or a replica as NAME/NUMBER")
    delete = command("delete", _delete, "serve a model no more", "Drain all replicas of a model.", AdminConfig)
    delete.add_argument("name", help="of the deployment")
    why = command("why", _why, "what requests wait for", "What requests wait for, and how long yet.", AdminConfig)
    why.add_argument("request", nargs="?", default="", help="its id [all that wait]")
    balancer = command(
        "load-balancer",
        _load_balancer,
        "the configuration of one for the gateways",
        "Write a load balancer's configuration for the gateways that are registered now.",
        LoadBalancerConfig,
    )
    balancer.add_argument("kind", choices=("haproxy", "nginx", "envoy"))
    balancer.add_argument("--watch", action="store_true", help="go on, and write it again when gateways come and go")
    command("shutdown", _shutdown, "end a cluster", "Finish what runs, and end the cluster.", AdminConfig)

    _add_governance(command)

    chat = command("chat", _chat, "talk to a served model", "Talk to a served model.", ChatConfig)
    chat.add_argument("prompt", nargs="?", help="without it: a conversation")
    complete = command("complete", _complete, "complete a text with a served model", "Complete a text.", CompleteConfig)
    complete.add_argument("prompt")

    batch = command(
        "run-batch",
        _run_batch,
        "run a file of requests offline",
        "Run an OpenAI batch file offline.",
        EngineConfig,
        MediaConfig,
    )
    batch.add_argument("input", help="JSON lines with custom_id, url and body")
    batch.add_argument("-o", "--output", required=True, help="JSON lines, one result per request, in the input's order")
    batch.add_argument("--model", default=argparse.SUPPRESS, help=f"[{DEMO_MODEL}]")

    plan = command(
        "plan",
        _plan,
        "what a model needs, before it is loaded",
        "What a model needs, per worker.",
        PlanConfig,
        EngineConfig,
    )
    _model_argument(plan)
    return parser


def _add_governance(command: _Command) -> None:
    """What is done to the governance database."""

    def group(name: str, help: str) -> _Command:
        return _commands(command(name, lambda arguments: None, help, help[0].upper() + help[1:] + "."))

    def add(
        to: _Command, name: str, does: str, help: str, *configs: type, lists: bool = False
    ) -> argparse.ArgumentParser:
        def run(arguments: argparse.Namespace, *given: Any) -> None:
            from quire.cli import governance

            getattr(governance, does)(arguments, *given)

        made = to(name, run, help, help[0].upper() + help[1:] + ".", GovernanceConfig, *configs)
        if lists:
            form = made.add_mutually_exclusive_group()
            form.add_argument("--json", action="store_true", help="for programs")
            form.add_argument("--csv", action="store_true", help="for tables")
        return made

    tenants = group("tenants", "who is served, limited and billed as one")
    add(tenants, "add", "add_tenant", "make a tenant", TenantConfig).add_argument("name")
    change = add(tenants, "set", "set_tenant", "change what is given; none lifts a limit", TenantConfig)
    change.add_argument("name")
    add(tenants, "remove", "remove_tenant", "end a tenant and its keys").add_argument("name")
    add(tenants, "list", "list_tenants", "all tenants", lists=True)

    keys = group("keys", "what callers send to be known")
    create = add(keys, "create", "create_key", "make a key, which is shown once")
    create.add_argument("tenant", help="whose it is")
    create.add_argument("--role", default="user", help="user: models; auditor: usage and records; admin: all [user]")
    create.add_argument("--models", default="*", help="patterns of names (separated by commas) [*]")
    create.add_argument("--expires", help="after a time, as 90d or 12h [never]")
    rotate = add(keys, "rotate", "rotate_key", "make a key that takes another one's place")
    rotate.add_argument("id", help="of the old one, as qk-1a2b3c4d")
    rotate.add_argument("--overlap", default="24h", help="how long the old one is good yet [24h]")
    add(keys, "revoke", "revoke_key", "end a key").add_argument("id", help="as qk-1a2b3c4d")
    listed = add(keys, "list", "list_keys", "all keys, without what they are", lists=True)
    listed.add_argument("--tenant", help="of one tenant alone")

    usage = add(command, "usage", "show_usage", "requests and tokens", lists=True)
    for name in ("tenant", "key", "model"):
        usage.add_argument(f"--{name}", help=f"of one {name} alone")
    usage.add_argument("--since", help="a day, as 2026-11-01 [the first]")
    usage.add_argument("--until", help="the last day [today]")
    usage.add_argument("--by", default="tenant", help="tenant, day, key or model [tenant]")

    audit = group("audit", "what is on record")
    records = add(audit, "list", "list_audit", "records, the newest first", lists=True)
    records.add_argument("--tenant", help="of one tenant alone")
    records.add_argument("--kind", help="request, refused or admin [all]")
    records.add_argument("--limit", type=int, default=50, help="records, at most [50]")
    verify = add(audit, "verify", "verify_audit", "look whether any record was changed")
    verify.add_argument("--export", metavar="FILE", help="that `quire audit export` wrote [the database]")
    verify.add_argument("--checkpoint", metavar="FILE", help="that was kept elsewhere")
    verify.add_argument("--key", metavar="FILE", help="the signing key, or its public half, in PEM [governance's]")
    export = add(audit, "export", "export_audit", "write all records as lines of JSON")
    export.add_argument("-o", "--output", metavar="FILE", help="that is not there yet [the terminal]")
    add(audit, "checkpoint", "checkpoint_audit", "the signed end of the log, to be kept elsewhere")


def _model_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        default=argparse.SUPPRESS,
        help=f"checkpoint folder, .gguf file, model package or hub id [{DEMO_MODEL}]",
    )


def read(argv: Sequence[str]) -> tuple[argparse.Namespace, list[Any]]:
    """A command's arguments, and its configurations. Raises InvalidParameter, and SystemExit as argparse does."""
    for argument in argv:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise InvalidParameter(f"the argument {argument!r:.80} is not in UTF-8") from error
    arguments = _parser().parse_args(argv)
    values = vars(arguments)
    if "config" in values:
        values = read_config_file(values["config"], names_of(arguments.configs)) | values
    if EngineConfig in arguments.configs:
        values = {"model": DEMO_MODEL} | values
    return arguments, [build(config, values) for config in arguments.configs]


def _serve(arguments: argparse.Namespace, config: ServeConfig, engine: EngineConfig) -> None:
    # Until the server listens to signals there is nothing to put away, and what is imported may swallow an exception.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from quire_cluster.serve import Server, serve

    def on_ready(server: Server) -> None:
        host = "localhost" if config.host in ("127.0.0.1", "0.0.0.0", "::") else config.host
        scheme = "http" if config.ssl_certfile is None else "https"
        http, grpc = with_port(host, server.http_port), with_port(host, server.grpc_port)
        say(
            f"\nready: {', '.join(server.model_names)}\n"
            f"  OpenAI API  {scheme}://{http}/v1\n"
            f"  gRPC        {grpc}{_with_tls(config)}\n"
            f"  metrics     {scheme}://{http}/metrics\n"
        )

    serve(engine, config, on_ready)


def _with_tls(config: GatewayConfig) -> str:
    return "" if config.ssl_certfile is None else " (TLS)"


def _start(arguments: argparse.Namespace, config: StartConfig) -> None:
    from quire_cluster.start import start

    from quire.cli.operate import operator_file

    fresh = start(config, operator_file())
    host = "localhost" if config.host in ("127.0.0.1", "0.0.0.0", "::") else config.host
    scheme = "http" if config.ssl_certfile is None else "https"
    say(
        f"the cluster {'has started' if fresh else 'runs already'}; deploy models with `quire deploy FILE`\n"
        f"  OpenAI API  {f'{scheme}://{with_port(host, config.port)}/v1' if config.port else _ANY_PORT}\n"
        f"  gRPC        {with_port(host, config.grpc_port) if config.grpc_port else _ANY_PORT}{_with_tls(config)}\n"
        f"  operators   {operator_file()} has the address and the key for `quire status` and the others"
    )


def _deploy(arguments: argparse.Namespace, config: AdminConfig) -> None:
    from quire.cli.operate import deploy

    deploy(arguments.file, config)


def _status(arguments: argparse.Namespace, config: AdminConfig) -> None:
    from quire.cli.operate import status

    status(config, watch=arguments.watch, as_json=arguments.json)


def _scale(arguments: argparse.Namespace, config: AdminConfig) -> None:
    from quire.cli.operate import scale

    scale(arguments.name, arguments.replicas, config)


def _drain(arguments: argparse.Namespace, config: AdminConfig) -> None:
    from quire.cli.operate import drain

    drain(arguments.what, config)


def _delete(arguments: argparse.Namespace, config: AdminConfig) -> None:
    from quire.cli.operate import delete

    delete(arguments.name, config)


def _why(arguments: argparse.Namespace, config: AdminConfig) -> None:
    from quire.cli.operate import why

    why(arguments.request, config)


def _load_balancer(arguments: argparse.Namespace, config: LoadBalancerConfig) -> None:
    from quire.cli.load_balancer import load_balancer

    load_balancer(arguments.kind, config, watch=arguments.watch)


def _shutdown(arguments: argparse.Namespace, config: AdminConfig) -> None:
    from quire.cli.operate import shutdown

    shutdown(config)


def _plan(arguments: argparse.Namespace, config: PlanConfig, engine: EngineConfig) -> None:
    from quire.cli.plan import show_plan

    show_plan(engine, config)


def _run_batch(arguments: argparse.Namespace, engine: EngineConfig, media: MediaConfig) -> None:
    from quire.cli.batch import run_batch

    run_batch(engine, arguments.input, arguments.output, media)


def _chat(arguments: argparse.Namespace, config: ChatConfig) -> None:
    from quire.cli.talk import chat

    chat(arguments.prompt, config)


def _complete(arguments: argparse.Namespace, config: CompleteConfig) -> None:
    from quire.cli.talk import complete

    complete(arguments.prompt, config)


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for name in ("uvicorn", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; errors are one line that says what was wrong and how to mend it."""
    try:
        prepare()
        try:
            arguments, configs = read(sys.argv[1:] if argv is None else argv)
            _log_to_stderr()
            arguments.run(arguments, *configs)
        finally:
            flush()
    except QuireError as error:
        print(f"quire: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # Python flushes standard output once more at its end; what is left of it has no reader.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    return 0


if __name__ == "__main__":
    sys.exit(main())
