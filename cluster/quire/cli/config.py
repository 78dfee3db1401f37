"""What the commands take that have neither an engine nor a server of their own."""

from dataclasses import dataclass

from quire_engine.config import check, option

_UINT32 = 2**32 - 1


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """The request."""

    address: str = option("127.0.0.1:50051", "gRPC address of the server")
    api_key: str | None = option(None, "key of the server (default: $QUIRE_API_KEY)")
    model: str | None = option(None, "where the server has several names")
    max_tokens: int | None = option(
        None, "longest answer, in tokens (default: what is left of the context)", least=1, most=_UINT32
    )
    temperature: float = option(1.0, "0: always the likeliest token", least=0, most=1000)
    seed: int | None = option(None, "the same seed draws the same tokens", least=-(2**63))

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class CompleteConfig(ChatConfig):
    """The request."""

    max_tokens: int | None = option(128, "longest text, in tokens", least=1, most=_UINT32)


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """The device."""

    gpu: str | None = option(None, "plan for a GPU that need not be here: H100, H200, MI300X, ...")
    memory_gib: float | None = option(
        None, "memory that a worker may use (default: what its device has)", above=0, most=4096
    )

    def __post_init__(self) -> None:
        check(self)
