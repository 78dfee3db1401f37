"""Mistral: Llama's shape; v0.1 attends in a sliding window."""

from typing import Any

from quire_engine.models.spec import DecoderSpec, base_spec


def spec(config: dict[str, Any]) -> DecoderSpec:
    """One window for all layers; null means none."""
    window = config.get("sliding_window") or 0
    return base_spec(config, windows=(window,) * config["num_hidden_layers"] if window else ())
