"""The server's configuration. Each default stands here once; command-line options are generated from these fields."""

import json
from dataclasses import dataclass

from quire_engine.config import check, option
from quire_engine.errors import InvalidParameter


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """The server around the engines."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 opens the server to other machines")
    port: int = option(8000, "of the OpenAI HTTP API; 0: any free one", least=0, most=65535)
    grpc_port: int = option(50051, "of the gRPC API; 0: any free one", least=0, most=65535)
    served_model_name: str | None = option(None, "what clients call the model (several: separated by commas)")
    data_parallel_size: int = option(1, "replicas of the engine", flags=("-dp",), least=1, most=4096)
    api_key: str | None = option(
        None, "key that every call but health and readiness must send (or in the environment: QUIRE_API_KEY)"
    )
    api_key_file: str | None = option(None, "file with such keys, one a line, of which any is good")
    allowed_hosts: str | None = option(
        None,
        "names that the server answers to (several: separated by commas); on a loopback address localhost besides, "
        "elsewhere any name if none is given",
    )
    allowed_origins: str | None = option(
        None, "web sites whose pages may call the server, as https://example.org (several: separated by commas; *: all)"
    )
    max_connections: int = option(4096, "HTTP connections, and as many of gRPC, open at a time", least=1, most=1 << 20)
    header_timeout: float = option(20.0, "seconds until the headers of a request are there", least=0.1, most=86400)
    body_timeout: float = option(120.0, "seconds until the body of a request is there", least=0.1, most=86400)
    write_timeout: float = option(60.0, "seconds that a client may leave its answer unread", least=0.1, most=86400)
    chat_template: str | None = option(None, "file with a chat template instead of the model's own")
    ray_address: str | None = option(None, "a running Ray cluster to join (default: a private one on this machine)")
    shutdown_timeout: float = option(
        30.0, "seconds that running requests get to finish at the end", least=0, most=86400
    )

    def __post_init__(self) -> None:
        check(self)
        if self.served_model_name is not None and not all(self.served_model_name.split(",")):
            raise InvalidParameter(
                f"served_model_name is {self.served_model_name!r}, which holds an empty name", "served_model_name"
            )


def entries(text: str | None) -> tuple[str, ...]:
    """Of an option whose values are separated by commas, or given as a JSON list."""
    if text is None:
        return ()
    if text.startswith("["):
        try:
            listed = json.loads(text)
        except ValueError as error:
            raise InvalidParameter(f"{text!r} is no JSON list: {error}") from error
        return tuple(str(entry) for entry in listed)
    return tuple(entry.strip() for entry in text.split(",") if entry.strip())
