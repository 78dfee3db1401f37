from google.protobuf import struct_pb2 as _struct_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DeploymentSpec(_message.Message):
    __slots__ = ("name", "options", "chat_template")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    name: str
    options: _struct_pb2.Struct
    chat_template: str
    def __init__(self, name: _Optional[str] = ..., options: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., chat_template: _Optional[str] = ...) -> None: ...

class DeployRequest(_message.Message):
    __slots__ = ("deployments",)
    DEPLOYMENTS_FIELD_NUMBER: _ClassVar[int]
    deployments: _containers.RepeatedCompositeFieldContainer[DeploymentSpec]
    def __init__(self, deployments: _Optional[_Iterable[_Union[DeploymentSpec, _Mapping]]] = ...) -> None: ...

class DeployResponse(_message.Message):
    __slots__ = ("done",)
    class DoneEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    DONE_FIELD_NUMBER: _ClassVar[int]
    done: _containers.ScalarMap[str, str]
    def __init__(self, done: _Optional[_Mapping[str, str]] = ...) -> None: ...

class DeleteRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class DeleteResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ScaleRequest(_message.Message):
    __slots__ = ("name", "replicas")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    name: str
    replicas: int
    def __init__(self, name: _Optional[str] = ..., replicas: _Optional[int] = ...) -> None: ...

class ScaleResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("replica", "node")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    replica: ReplicaName
    node: str
    def __init__(self, replica: _Optional[_Union[ReplicaName, _Mapping]] = ..., node: _Optional[str] = ...) -> None: ...

class ReplicaName(_message.Message):
    __slots__ = ("deployment", "slot")
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    deployment: str
    slot: int
    def __init__(self, deployment: _Optional[str] = ..., slot: _Optional[int] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReplicaStatus(_message.Message):
    __slots__ = ("slot", "epoch", "phase", "seconds", "nodes", "failure", "running", "waiting", "usage", "outdated")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    OUTDATED_FIELD_NUMBER: _ClassVar[int]
    slot: int
    epoch: int
    phase: str
    seconds: float
    nodes: _containers.RepeatedScalarFieldContainer[str]
    failure: str
    running: int
    waiting: int
    usage: float
    outdated: bool
    def __init__(self, slot: _Optional[int] = ..., epoch: _Optional[int] = ..., phase: _Optional[str] = ..., seconds: _Optional[float] = ..., nodes: _Optional[_Iterable[str]] = ..., failure: _Optional[str] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., usage: _Optional[float] = ..., outdated: _Optional[bool] = ...) -> None: ...

class DeploymentStatus(_message.Message):
    __slots__ = ("name", "aliases", "model", "state", "wanted", "why_wanted", "min_replicas", "max_replicas", "replicas", "at_gateways", "waiting_for", "tokens_per_second", "pinned")
    class WaitingForEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    WHY_WANTED_FIELD_NUMBER: _ClassVar[int]
    MIN_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    MAX_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    AT_GATEWAYS_FIELD_NUMBER: _ClassVar[int]
    WAITING_FOR_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    name: str
    aliases: _containers.RepeatedScalarFieldContainer[str]
    model: str
    state: str
    wanted: int
    why_wanted: str
    min_replicas: int
    max_replicas: int
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaStatus]
    at_gateways: int
    waiting_for: _containers.ScalarMap[str, int]
    tokens_per_second: float
    pinned: int
    def __init__(self, name: _Optional[str] = ..., aliases: _Optional[_Iterable[str]] = ..., model: _Optional[str] = ..., state: _Optional[str] = ..., wanted: _Optional[int] = ..., why_wanted: _Optional[str] = ..., min_replicas: _Optional[int] = ..., max_replicas: _Optional[int] = ..., replicas: _Optional[_Iterable[_Union[ReplicaStatus, _Mapping]]] = ..., at_gateways: _Optional[int] = ..., waiting_for: _Optional[_Mapping[str, int]] = ..., tokens_per_second: _Optional[float] = ..., pinned: _Optional[int] = ...) -> None: ...

class GatewayStatus(_message.Message):
    __slots__ = ("id", "node", "http", "grpc", "ready", "open_requests", "age", "tls")
    ID_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    HTTP_FIELD_NUMBER: _ClassVar[int]
    GRPC_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    OPEN_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    AGE_FIELD_NUMBER: _ClassVar[int]
    TLS_FIELD_NUMBER: _ClassVar[int]
    id: str
    node: str
    http: str
    grpc: str
    ready: bool
    open_requests: int
    age: float
    tls: bool
    def __init__(self, id: _Optional[str] = ..., node: _Optional[str] = ..., http: _Optional[str] = ..., grpc: _Optional[str] = ..., ready: _Optional[bool] = ..., open_requests: _Optional[int] = ..., age: _Optional[float] = ..., tls: _Optional[bool] = ...) -> None: ...

class NodeStatus(_message.Message):
    __slots__ = ("id", "address", "head", "leaving", "cpus", "gpus")
    ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    CPUS_FIELD_NUMBER: _ClassVar[int]
    GPUS_FIELD_NUMBER: _ClassVar[int]
    id: str
    address: str
    head: bool
    leaving: bool
    cpus: float
    gpus: float
    def __init__(self, id: _Optional[str] = ..., address: _Optional[str] = ..., head: _Optional[bool] = ..., leaving: _Optional[bool] = ..., cpus: _Optional[float] = ..., gpus: _Optional[float] = ...) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("cluster", "deployments", "gateways", "nodes", "seconds")
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    DEPLOYMENTS_FIELD_NUMBER: _ClassVar[int]
    GATEWAYS_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    cluster: str
    deployments: _containers.RepeatedCompositeFieldContainer[DeploymentStatus]
    gateways: _containers.RepeatedCompositeFieldContainer[GatewayStatus]
    nodes: _containers.RepeatedCompositeFieldContainer[NodeStatus]
    seconds: float
    def __init__(self, cluster: _Optional[str] = ..., deployments: _Optional[_Iterable[_Union[DeploymentStatus, _Mapping]]] = ..., gateways: _Optional[_Iterable[_Union[GatewayStatus, _Mapping]]] = ..., nodes: _Optional[_Iterable[_Union[NodeStatus, _Mapping]]] = ..., seconds: _Optional[float] = ...) -> None: ...

class WhyRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class WaitingRequest(_message.Message):
    __slots__ = ("request_id", "deployment", "index", "reason", "since", "estimate", "tokens", "gateway")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    ESTIMATE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    deployment: str
    index: int
    reason: str
    since: float
    estimate: float
    tokens: int
    gateway: str
    def __init__(self, request_id: _Optional[str] = ..., deployment: _Optional[str] = ..., index: _Optional[int] = ..., reason: _Optional[str] = ..., since: _Optional[float] = ..., estimate: _Optional[float] = ..., tokens: _Optional[int] = ..., gateway: _Optional[str] = ...) -> None: ...

class WhyResponse(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[WaitingRequest]
    def __init__(self, requests: _Optional[_Iterable[_Union[WaitingRequest, _Mapping]]] = ...) -> None: ...

class ShutdownRequest(_message.Message):
    __slots__ = ("drain_seconds",)
    DRAIN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    drain_seconds: float
    def __init__(self, drain_seconds: _Optional[float] = ...) -> None: ...

class ShutdownResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
