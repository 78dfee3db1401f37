"""`quire chat` and `quire complete`: a served model at the terminal."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
from quire_cluster.config import entries
from quire_engine.errors import InvalidParameter, ServerError

from quire.cli.config import ChatConfig, CompleteConfig, TalkConfig
from quire.cli.terminal import ask, say
from quire.client import Client
from quire.messages import Output


def complete(prompt: str, config: CompleteConfig) -> None:
    """One text, streamed to the terminal."""
    with _client(config) as client:
        _show(client.stream(prompt, **_options(config)), config.address)


def chat(prompt: str | None, config: ChatConfig) -> None:
    """One question, or a conversation until the end of input."""
    messages: list[dict[str, Any]] = []
    shown: list[dict[str, Any]] = [{"type": "image", "image": Path(file)} for file in entries(config.image)]
    with _client(config) as client:
        while (question := ask("you ") if prompt is None else prompt) is not None:
            asked = [*shown, {"type": "text", "text": question}] if shown else question
            messages.append({"role": "user", "content": asked})
            shown = []
            answer = _show(client.stream_chat(messages, **_options(config)), config.address)
            messages.append({"role": "assistant", "content": answer})
            if prompt is not None:
                return


def _client(config: TalkConfig) -> Client:
    """Raises InvalidParameter."""
    certificate = None
    if config.ssl_certfile is not None and config.ssl_keyfile is not None:
        certificate = config.ssl_certfile, config.ssl_keyfile
    elif config.ssl_certfile is not None or config.ssl_keyfile is not None:
        raise InvalidParameter(
            "a certificate and its key go together; give both --ssl-certfile and --ssl-keyfile, or neither",
            "ssl_keyfile" if config.ssl_keyfile is None else "ssl_certfile",
        )
    return Client(
        config.address,
        api_key=config.api_key or os.environ.get("QUIRE_API_KEY"),
        tls=config.ssl_ca_certs or config.tls,
        certificate=certificate,
    )


def _options(config: TalkConfig) -> dict[str, Any]:
    options = {name: getattr(config, name) for name in ("max_tokens", "temperature", "seed")}
    return options | {"model": config.model or ""}


def _show(stream: Iterator[Output], address: str) -> str:
    """Prints an answer as it comes, its reasoning ahead of it, and returns it without that. Raises ServerError with
    what the server said."""
    answer, reasons = "", False
    try:
        for output in stream:
            say(output.reasoning, end="")
            reasons = reasons or bool(output.reasoning)
            if output.text:
                say("\n\n" if reasons and not answer else "", end="")
            answer += output.text
            say(output.text, end="")
    except grpc.RpcError as error:
        call: Any = error
        if call.code() is grpc.StatusCode.UNAVAILABLE:
            raise ServerError(
                f"no server answers at {address} ({call.details()}); start one with `quire serve`; one with a "
                "certificate wants --tls or --ssl-ca-certs"
            ) from error
        raise ServerError(str(call.details())) from error
    say("")
    return answer
