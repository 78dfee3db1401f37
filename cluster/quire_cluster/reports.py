"""What gateways tell the controller, once a second: where they are, how loaded replicas are, and what waits."""

from dataclasses import dataclass, field

from quire_cluster.routing_table import Key


@dataclass(frozen=True, kw_only=True)
class ReplicaReport:
    """A replica's load, as it last told this gateway."""

    key: Key
    age: float  # seconds since it did
    running: int
    waiting: int
    queued_tokens: int  # known, and not computed
    prefill_rate: float  # tokens per second; 0: not measured
    computed: int  # tokens of prompts that no cache held, since the replica's start
    pages_used: int
    pages_total: int
    rows: int  # requests that run at once, at most
    waiting_for: dict[str, int] = field(default_factory=dict)  # requests by what they wait for


@dataclass(frozen=True, kw_only=True)
class ModelReport:
    """Of one deployment."""

    replicas: tuple[ReplicaReport, ...] = ()
    at_gateway: int = 0  # requests that wait there for a replica
    at_gateway_for: str = ""  # for what, in words
    tokens_at_gateway: int = 0  # of their prompts
    generated: int = 0  # tokens, since the gateway's start


@dataclass(frozen=True, kw_only=True)
class GatewayReport:
    """Of one gateway. It holds for as long as its lease: a few seconds."""

    identity: str
    node: str
    pid: int
    host: str  # where clients reach it
    http_port: int
    grpc_port: int
    tls: bool  # on both
    ready: bool
    open_requests: int
    models: dict[str, ModelReport] = field(default_factory=dict)  # by the deployment's name


@dataclass(frozen=True, kw_only=True)
class WaitingRequest:
    """What one answer of a request waits for."""

    request_id: str
    deployment: str
    index: int  # which of the n answers
    reason: str  # "": it runs
    since: float  # seconds
    estimate: float | None  # seconds until it should run, as far as is known
    tokens: int  # generated so far
