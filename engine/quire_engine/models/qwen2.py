"""Qwen2 and 2.5: bias on q, k and v; optionally a window on the upper layers."""

from quire_engine.models.base import base_spec, layer_windows
from quire_engine.spec import Config, DecoderSpec


def upper_windows(config: Config) -> tuple[int, ...]:
    """`use_sliding_window` puts the window on layers from `max_window_layers` on."""
    if not config.get("use_sliding_window") or not config.get("sliding_window"):
        return ()
    first, layers = config.get("max_window_layers", 28), config["num_hidden_layers"]
    kinds = config.get("layer_types") or ["full_attention"] * first + ["sliding_attention"] * (layers - first)
    return layer_windows({**config, "layer_types": kinds}, layers)


def spec(config: Config) -> DecoderSpec:
    """No bias on o."""
    return base_spec(config, qkv_bias=True, windows=upper_windows(config))
