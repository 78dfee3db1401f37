"""The server's configuration. Each default stands here once; command-line options are generated from these fields."""

import re
from dataclasses import dataclass
from pathlib import Path

from quire_engine.config import check, option
from quire_engine.errors import InvalidParameter

from quire_cluster.hosts import Hosts

_IPV6 = "[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*"
_HOST = re.compile(rf"[\w.-]+|{_IPV6}|\[{_IPV6}\]", re.ASCII)
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\sA-Z]+")


@dataclass(frozen=True, kw_only=True)
class MediaConfig:
    """Where pictures may come from, besides the calls themselves."""

    allowed_media_domains: str | None = option(
        None,
        "that calls may have fetched, at its public addresses and the ports 80 and 443; with another port as "
        "example.org:8080; private addresses by themselves, as 10.0.0.0/8; *: any public host",
        form="hosts (separated by commas)",
        unset="none",
    )
    allowed_local_media_path: str | None = option(
        None, "whose files calls may name, as file:///folder/picture.png", form="a folder of the gateway", unset="none"
    )

    def __post_init__(self) -> None:
        check(self)
        try:
            Hosts(entries(self.allowed_media_domains))
        except ValueError as error:
            raise InvalidParameter(
                f"allowed_media_domains: {error!s:.200}; give names, addresses or networks, as example.org, "
                "example.org:8080, 10.1.2.3, 10.0.0.0/8, [fd00::/8]:8080, or * for any public host",
                "allowed_media_domains",
            ) from error
        if self.allowed_local_media_path is not None and not Path(self.allowed_local_media_path).is_absolute():
            raise InvalidParameter(
                f"allowed_local_media_path is {self.allowed_local_media_path!r:.80}; give the folder's whole path, "
                "from / on",
                "allowed_local_media_path",
            )


@dataclass(frozen=True, kw_only=True)
class GatewayConfig(MediaConfig):
    """The gateway: what clients reach."""

    host: str = option(
        "127.0.0.1",
        "to listen on; 0.0.0.0 opens the server to other machines",
        form="an address or a name of this machine",
    )
    port: int = option(8000, "of the OpenAI HTTP API; 0: any free one", least=0, most=65535)
    grpc_port: int = option(50051, "of the gRPC API; 0: any free one", least=0, most=65535)
    api_key: str | None = option(
        None,
        "that every call but health and readiness must send",
        form="a key of visible ASCII characters",
        unset="$QUIRE_API_KEY, or everybody may call",
    )
    api_key_file: str | None = option(
        None, "of which any is good", form="a file of such keys (one a line)", unset="none"
    )
    governance: str | None = option(
        None,
        "that says who may call, by keys of `quire keys create`, and what is on record (see docs/governance.md)",
        form="a file",
        unset="everybody who has the API key may",
    )
    allowed_hosts: str | None = option(
        None,
        "that the server answers to, on a loopback address besides its own",
        form="names without a port (separated by commas)",
        unset="on a loopback address its own; elsewhere any",
    )
    allowed_origins: str | None = option(
        None,
        "whose pages may call the server; *: all",
        form="sites as https://example.org (separated by commas)",
        unset="none",
    )
    ssl_certfile: str | None = option(
        None,
        "that clients are shown over HTTP and gRPC, with those that lead to its CA; read anew when it changes",
        form="a PEM file with a certificate, on each host of a gateway",
        unset="none: no TLS",
    )
    ssl_keyfile: str | None = option(
        None, "of the certificate, not encrypted", form="a PEM file with an RSA or ECDSA key", unset="none: no TLS"
    )
    ssl_ca_certs: str | None = option(
        None,
        "whose clients' certificates are asked for, and nobody else is answered: no health check, either",
        form="a PEM file with CAs",
        unset="none: clients need no certificate",
    )
    max_connections: int = option(
        4096, "of HTTP, and as many of gRPC, open at a time", form="connections", least=1, most=1 << 20
    )
    header_timeout: float = option(
        20.0, "until the headers of a request are there", form="seconds", least=0.1, most=86400
    )
    body_timeout: float = option(120.0, "until the body of a request is there", form="seconds", least=0.1, most=86400)
    write_timeout: float = option(
        60.0, "that a client may leave its answer unread", form="seconds", least=0.1, most=86400
    )
    shutdown_timeout: float = option(
        30.0, "that running requests get to finish at the end", form="seconds", least=0, most=86400
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.governance is not None and (self.api_key is not None or self.api_key_file is not None):
            raise InvalidParameter(
                "with --governance the keys are those of `quire keys create`; leave out --api-key and --api-key-file",
                "api_key",
            )
        for host in entries(self.allowed_hosts):
            if not _HOST.fullmatch(host):
                raise InvalidParameter(
                    f"allowed_hosts holds {host!r:.80}; give names alone, as models.example.org: no port, no pattern",
                    "allowed_hosts",
                )
        for origin in entries(self.allowed_origins):
            if origin not in ("*", "null") and not _ORIGIN.fullmatch(origin):
                raise InvalidParameter(
                    f"allowed_origins holds {origin!r:.80}; give each as browsers send it, as https://example.org: "
                    "with its scheme, in lower case, without a path",
                    "allowed_origins",
                )


@dataclass(frozen=True, kw_only=True)
class ParserConfig:
    """How what a model writes is read."""

    tool_call_parser: str | None = option(
        None,
        "of its calls of tools",
        form="hermes, llama3_json, mistral, ... or none (see docs/tools.md)",
        unset="read off the chat template",
    )
    reasoning_parser: str | None = option(
        None, "of its reasoning", form="deepseek_r1, granite, ... or none", unset="read off the chat template"
    )
    enable_auto_tool_choice: bool = option(True, "let models call tools that a request offers, if they like")


@dataclass(frozen=True, kw_only=True)
class ServeConfig(ParserConfig, GatewayConfig):
    """The server around the engines."""

    served_model_name: str | None = option(
        None, "that clients call the model by", form="names (separated by commas)", unset="its folder's or file's"
    )
    data_parallel_size: int = option(1, "of the engine", form="replicas", flags=("-dp",), least=1, most=4096)
    chat_template: str | None = option(
        None, "in place of the model's", form="a file with a chat template", unset="the model's own"
    )
    ray_address: str | None = option(
        None, "to join", form="auto or the address of a Ray cluster", unset="a private one on this machine"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.served_model_name is not None and not all(self.served_model_name.split(",")):
            raise InvalidParameter(
                f"served_model_name is {self.served_model_name!r}, which holds an empty name", "served_model_name"
            )


def entries(text: str | None) -> tuple[str, ...]:
    """Of an option whose values are separated by commas."""
    return tuple(entry.strip() for entry in (text or "").split(",") if entry.strip())


@dataclass(frozen=True, kw_only=True)
class StartConfig(GatewayConfig):
    """The cluster."""

    ray_address: str = option("auto", "to start in", form="auto or the address of a Ray cluster")
    gateways: int = option(
        1, "per node, which share its ports (with --port 0 each has its own)", form="gateways", least=1, most=64
    )
    gateways_on: str = option(
        "head", "nodes that have gateways; all: the head, and those with replicas", choices=("head", "all")
    )
    admin_host: str = option(
        "127.0.0.1", "of the head, for operators' calls", form="an address or a name of this machine"
    )
    admin_port: int = option(8001, "of operators' calls over HTTP", least=1, most=65535)
    admin_grpc_port: int = option(50052, "of operators' calls over gRPC", least=1, most=65535)
