"""`quire chat` and `quire complete`: a served model at the terminal."""

import argparse
from typing import Any

import grpc
from quire_engine.errors import ServerError
from rich.console import Console

from quire.client import Client


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("max_tokens", "temperature", "seed")}


def _fail(error: grpc.RpcError, address: str) -> ServerError:
    call: Any = error
    if call.code() is grpc.StatusCode.UNAVAILABLE:
        return ServerError(f"no server answers at {address} ({call.details()}); start one with `quire serve`")
    return ServerError(str(call.details()))


def complete(arguments: argparse.Namespace) -> None:
    """One text, streamed to the terminal."""
    with Client(arguments.address, api_key=arguments.api_key) as client:
        try:
            for output in client.stream(arguments.prompt, model=arguments.model, **_options(arguments)):
                print(output.text, end="", flush=True)
        except grpc.RpcError as error:
            raise _fail(error, arguments.address) from error
    print()


def chat(arguments: argparse.Namespace) -> None:
    """One question, or a conversation until the end of input."""
    console = Console()
    messages: list[dict[str, str]] = []
    with Client(arguments.address, api_key=arguments.api_key) as client:
        while True:
            question = arguments.prompt or _ask(console)
            if question is None:
                return
            messages.append({"role": "user", "content": question})
            answer = ""
            try:
                for output in client.stream_chat(messages, model=arguments.model, **_options(arguments)):
                    answer += output.text
                    console.print(output.text, end="", highlight=False, markup=False, soft_wrap=True)
            except grpc.RpcError as error:
                raise _fail(error, arguments.address) from error
            console.print()
            messages.append({"role": "assistant", "content": answer})
            if arguments.prompt:
                return


def _ask(console: Console) -> str | None:
    try:
        while not (question := console.input("[bold]you[/bold] ").strip()):
            pass
    except (EOFError, KeyboardInterrupt):
        console.print()
        return None
    return question
