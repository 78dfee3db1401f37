"""The command line: `quire serve`, `chat`, `complete`, `run-batch`, `plan`."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from quire_cluster.config import ServeConfig
from quire_engine.config import EngineConfig
from quire_engine.errors import QuireError
from quire_engine.weights.resolve import DEMO_MODEL

from quire.cli.options import add_options, build, read_config_file


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="quire", description="A serving cluster for open large language models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="serve a model over HTTP and gRPC", description="Serve a model.")
    _model_argument(serve)
    serve.add_argument("--config", metavar="FILE", help="YAML file with options; the command line goes before it")
    add_options(serve, ServeConfig)
    add_options(serve, EngineConfig)

    for name, text in (
        ("chat", "talk to a served model"),
        ("complete", "complete a text with a served model"),
    ):
        command = commands.add_parser(name, help=text, description=text.capitalize() + ".")
        command.add_argument("prompt", nargs="?" if name == "chat" else None, help="without it: a conversation")
        command.add_argument("--address", default="127.0.0.1:50051", help="gRPC address of the server [%(default)s]")
        command.add_argument("--api-key", default=os.environ.get("QUIRE_API_KEY"), help="[$QUIRE_API_KEY]")
        command.add_argument("--model", default="", help="where the server has several names")
        command.add_argument("--max-tokens", type=int, default=None if name == "chat" else 128)
        command.add_argument("--temperature", type=float, default=1.0)
        command.add_argument("--seed", type=int, default=None)

    batch = commands.add_parser(
        "run-batch", help="run a file of requests offline", description="Run an OpenAI batch file offline."
    )
    batch.add_argument("input", help="JSON lines with custom_id, url and body")
    batch.add_argument("-o", "--output", required=True, help="JSON lines, one result per request, in the input's order")
    batch.add_argument("--model", default=DEMO_MODEL, help="[%(default)s]")
    add_options(batch, EngineConfig)

    plan = commands.add_parser(
        "plan", help="what a model needs, before it is loaded", description="What a model needs, per worker."
    )
    _model_argument(plan)
    plan.add_argument("--gpu", help="plan for a GPU that need not be here: H100, H200, MI300X, ...")
    plan.add_argument("--memory-gib", type=float, help="memory that a worker may use (default: what its device has)")
    add_options(plan, EngineConfig)
    return parser


def _model_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        default=DEMO_MODEL,
        help="checkpoint folder, .gguf file, model package or hub id [%(default)s]",
    )


def _values(arguments: argparse.Namespace) -> dict[str, Any]:
    values = {name: value for name, value in vars(arguments).items() if name not in ("command", "config")}
    if path := getattr(arguments, "config", None):
        known = {f.name for kind in (EngineConfig, ServeConfig) for f in fields(kind)}
        from_file = read_config_file(path, known)
        if "model" in from_file and values["model"] == DEMO_MODEL:
            values["model"] = from_file["model"]
        values = from_file | values
    return values


def _serve(arguments: argparse.Namespace) -> None:
    from quire_cluster.serve import Server, serve

    values = _values(arguments)
    config = build(ServeConfig, values)

    def on_ready(server: Server) -> None:
        shown = "localhost" if config.host in ("127.0.0.1", "0.0.0.0", "::") else config.host
        print(
            f"\nready: {', '.join(server.model_names)}\n"
            f"  OpenAI API  http://{shown}:{server.http_port}/v1\n"
            f"  gRPC        {shown}:{server.grpc_port}\n"
            f"  metrics     http://{shown}:{server.http_port}/metrics\n",
            flush=True,
        )

    serve(build(EngineConfig, values), config, on_ready)


def _plan(arguments: argparse.Namespace) -> None:
    from quire.cli.plan import show_plan

    show_plan(build(EngineConfig, _values(arguments)), arguments.gpu, arguments.memory_gib)


def _run_batch(arguments: argparse.Namespace) -> None:
    from quire.cli.batch import run_batch

    run_batch(build(EngineConfig, _values(arguments)), arguments.input, arguments.output)


def _talk(arguments: argparse.Namespace) -> None:
    from quire.cli.talk import chat, complete

    (chat if arguments.command == "chat" else complete)(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; errors are one line that says what was wrong and how to mend it."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    commands = {"serve": _serve, "chat": _talk, "complete": _talk, "run-batch": _run_batch, "plan": _plan}
    try:
        commands[arguments.command](arguments)
    except QuireError as error:
        print(f"quire: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
