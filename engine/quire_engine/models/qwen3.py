"""Qwen3: RMSNorm on each query and key head, an explicit head_dim, no bias unless the config says so."""

from typing import Any

from quire_engine.models.qwen2 import layer_windows
from quire_engine.models.spec import DecoderSpec, base_spec


def spec(config: dict[str, Any]) -> DecoderSpec:
    """head_dim is 128 where the config leaves it out."""
    bias = bool(config.get("attention_bias", False))
    return base_spec(
        config,
        qk_norm=True,
        qkv_bias=bias,
        output_bias=bias,
        head_dim=config.get("head_dim") or 128,
        windows=layer_windows(config),
    )
