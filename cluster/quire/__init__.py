"""Quire: a serving cluster for open large language models.

`LLM` runs a model in this process, for offline batches; `Client` and `AsyncClient` speak gRPC to a server.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quire_engine.text.params import SamplingParams

    from quire.client import AsyncClient, Client
    from quire.llm import LLM, Completion, RequestOutput, ToolCall

__all__ = ["LLM", "AsyncClient", "Client", "Completion", "RequestOutput", "SamplingParams", "ToolCall"]

_HOMES = {
    "LLM": "quire.llm",
    "Completion": "quire.llm",
    "RequestOutput": "quire.llm",
    "ToolCall": "quire.llm",
    "Client": "quire.client",
    "AsyncClient": "quire.client",
    "SamplingParams": "quire_engine.text.params",
}


def __getattr__(name: str) -> Any:
    """Imports what is asked for: a client needs no torch, and an offline batch no gRPC."""
    if name not in _HOMES:
        raise AttributeError(f"module 'quire' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
