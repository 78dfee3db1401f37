"""The server's configuration. Each default stands here once; command-line options are generated from these fields."""

from dataclasses import dataclass

from quire_engine.config import option
from quire_engine.errors import InvalidParameter


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """The server around the engines."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 opens the server to other machines")
    port: int = option(8000, "of the OpenAI HTTP API; 0: any free one")
    grpc_port: int = option(50051, "of the gRPC API; 0: any free one")
    served_model_name: str | None = option(None, "what clients call the model (several: separated by commas)")
    data_parallel_size: int = option(1, "replicas of the engine", flags=("-dp",))
    api_key: str | None = option(None, "key that every call but health and readiness must send")
    chat_template: str | None = option(None, "file with a chat template instead of the model's own")
    ray_address: str | None = option(None, "a running Ray cluster to join (default: a private one on this machine)")
    shutdown_timeout: float = option(30.0, "seconds that running requests get to finish at the end")

    def __post_init__(self) -> None:
        for name in ("port", "grpc_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise InvalidParameter(f"{name} is {getattr(self, name)}; ports go from 0 to 65535", name)
        if self.data_parallel_size < 1:
            raise InvalidParameter(f"data_parallel_size is {self.data_parallel_size}; it must be at least 1")
        if self.shutdown_timeout < 0:
            raise InvalidParameter(f"shutdown_timeout is {self.shutdown_timeout}; it must be at least 0")
