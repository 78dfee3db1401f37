"""dots.llm1: Qwen3's attention, DeepSeek-V3's experts."""

from quire_kernels.norm import Norm

from quire_engine.models.base import base_spec, layer_windows
from quire_engine.models.deepseek import experts_of
from quire_engine.spec import Config, DecoderSpec, QKNorm


def spec(config: Config) -> DecoderSpec:
    """A window from `max_window_layers` on, where the config has one."""
    bias = bool(config["attention_bias"])
    return base_spec(
        config,
        qk_norm=QKNorm(norm=Norm(config["rms_norm_eps"])),
        qkv_bias=bias,
        output_bias=bias,
        windows=layer_windows(config),
        experts=experts_of(config),
    )
