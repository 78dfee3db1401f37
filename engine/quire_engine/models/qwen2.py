"""Qwen2 and 2.5: bias on q, k and v; optionally a window on the upper layers."""

from quire_engine.models.base import base_spec, layer_windows
from quire_engine.spec import Config, DecoderSpec


def upper_windows(config: Config) -> tuple[int, ...]:
    """`use_sliding_window` puts the window on layers from `max_window_layers` on, where `layer_types` is not given."""
    return layer_windows(config) if config["use_sliding_window"] else ()


def spec(config: Config) -> DecoderSpec:
    """No bias on o."""
    return base_spec(config, qkv_bias=True, windows=upper_windows(config))
