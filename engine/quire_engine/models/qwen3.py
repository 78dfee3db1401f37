"""Qwen3: RMSNorm on each query and key head, an explicit head_dim, no bias unless the config says so."""

from quire_kernels.norm import Norm

from quire_engine.models.base import base_spec
from quire_engine.models.qwen2 import upper_windows
from quire_engine.spec import Config, DecoderSpec, QKNorm


def spec(config: Config) -> DecoderSpec:
    """The window is Qwen2's."""
    bias = bool(config["attention_bias"])
    return base_spec(
        config,
        qk_norm=QKNorm(norm=Norm(config["rms_norm_eps"])),
        qkv_bias=bias,
        output_bias=bias,
        windows=upper_windows(config),
    )
