"""Qwen2 and 2.5: bias on q, k and v; optionally a window on the upper layers."""

from typing import Any

from quire_engine.models.spec import DecoderSpec, base_spec


def layer_windows(config: dict[str, Any]) -> tuple[int, ...]:
    """`use_sliding_window` puts the window on layers from `max_window_layers` on."""
    if not config.get("use_sliding_window") or not config.get("sliding_window"):
        return ()
    first, layers = config.get("max_window_layers", 28), config["num_hidden_layers"]
    kinds = config.get("layer_types") or [
        "sliding_attention" if i >= first else "full_attention" for i in range(layers)
    ]
    return tuple(config["sliding_window"] if kind == "sliding_attention" else 0 for kind in kinds)


def spec(config: dict[str, Any]) -> DecoderSpec:
    """No bias on o."""
    return base_spec(config, qkv_bias=True, windows=layer_windows(config))
