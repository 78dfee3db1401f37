"""dots.llm1: Qwen3's attention, DeepSeek-V3's experts."""

from quire_kernels.norm import Norm

from quire_engine.models.base import base_spec, layer_windows
from quire_engine.models.deepseek import experts_of
from quire_engine.spec import Config, DecoderSpec, QKNorm


def spec(config: Config) -> DecoderSpec:
    """A window from `max_window_layers` on, where the config has one."""
    bias = bool(config.get("attention_bias", False))
    return base_spec(
        config,
        qk_norm=QKNorm(norm=Norm(config.get("rms_norm_eps", 1e-6))),
        qkv_bias=bias,
        output_bias=bias,
        windows=layer_windows(config, config["num_hidden_layers"]),
        experts=experts_of(config),
    )
