"""What the commands take that have neither an engine nor a server of their own."""

from dataclasses import dataclass

from quire_engine.config import check, option

_UINT32 = 2**32 - 1


@dataclass(frozen=True, kw_only=True)
class TalkConfig:
    """What both kinds of requests have."""

    address: str = option(
        "127.0.0.1:50051", "of servers' gRPC ports", form="addresses as localhost:50051 (separated by commas)"
    )
    api_key: str | None = option(
        None, "of the server", form="a key of visible ASCII characters", unset="$QUIRE_API_KEY"
    )
    tls: bool = option(False, "to a server with a certificate of a well-known CA")
    ssl_ca_certs: str | None = option(
        None, "that the server's certificate is of; with it, TLS", form="a PEM file with CAs", unset="well-known ones"
    )
    ssl_certfile: str | None = option(
        None, "for a server that asks clients for one", form="a PEM file with a certificate", unset="none"
    )
    ssl_keyfile: str | None = option(
        None, "of that certificate", form="a PEM file with an unencrypted key", unset="none"
    )
    model: str | None = option(None, "where the server has several", form="a name of the model", unset="its first")
    max_tokens: int | None = option(
        None, "of the longest answer", form="tokens", unset="what is left of the context", least=1, most=_UINT32
    )
    temperature: float = option(1.0, "0: always the likeliest token", least=0, most=1000)
    seed: int | None = option(None, "the same seed draws the same tokens", unset="a random one", least=-(2**63))

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class ChatConfig(TalkConfig):
    """The request."""

    image: str | None = option(
        None, "that the first question is about", form="files of images (separated by commas)", unset="none"
    )


@dataclass(frozen=True, kw_only=True)
class CompleteConfig(TalkConfig):
    """The request."""

    max_tokens: int | None = option(128, "of the longest text", form="tokens", least=1, most=_UINT32)


@dataclass(frozen=True, kw_only=True)
class AdminConfig:
    """The cluster that is asked."""

    admin_address: str | None = option(
        None, "of operators' calls over gRPC", form="an address (as localhost:50052)", unset="what `quire start` wrote"
    )
    admin_key: str | None = option(
        None, "of the cluster", form="a key of visible ASCII characters", unset="$QUIRE_ADMIN_KEY, or what it wrote"
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class GovernanceConfig:
    """The governance."""

    governance: str | None = option(
        None,
        "that says where its database is",
        form="a file",
        unset="$QUIRE_GOVERNANCE, governance.yaml here, or in ~/.quire",
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class LoadBalancerConfig(AdminConfig):
    """The load balancer."""

    listen_host: str = option("0.0.0.0", "that clients reach it at", form="an address of its machine")
    listen_port: int = option(8080, "that clients reach it at over HTTP", least=1, most=65535)
    listen_grpc_port: int = option(50050, "that clients reach it at over gRPC", least=1, most=65535)
    ssl_ca_certs: str | None = option(
        None,
        "that gateways' certificates are of, where they have some",
        form="a PEM file with CAs, on the load balancer's machine",
        unset="none: gateways without TLS",
    )
    ssl_server_name: str | None = option(
        None, "that all gateways' certificates are for", form="a DNS name", unset="none: gateways without TLS"
    )
    output: str | None = option(None, "to write", form="a file", unset="the terminal")
    reload: str | None = option(
        None, "run after each write (as `systemctl reload haproxy`)", form="a command", unset="none"
    )


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """The device."""

    gpu: str | None = option(
        None, "that need not be here", form="the name of a GPU (as H100 or MI300X)", unset="what is here"
    )
    memory_gib: float | None = option(
        None, "of memory that a worker may use", form="GiB", unset="what its device has", above=0, most=4096
    )

    def __post_init__(self) -> None:
        check(self)
