"""Qwen3: RMSNorm on each query and key head, an explicit head_dim, no bias unless the config says so."""

from quire_kernels.norm import Norm

from quire_engine.models.base import base_spec
from quire_engine.models.qwen2 import upper_windows
from quire_engine.spec import Config, DecoderSpec, QKNorm


def spec(config: Config) -> DecoderSpec:
    """head_dim is 128 where the config leaves it out."""
    bias = bool(config.get("attention_bias", False))
    return base_spec(
        config,
        qk_norm=QKNorm(norm=Norm(config.get("rms_norm_eps", 1e-6))),
        qkv_bias=bias,
        output_bias=bias,
        head_dim=config.get("head_dim") or 128,
        windows=upper_windows(config),
    )
