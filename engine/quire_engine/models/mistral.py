"""Mistral: Llama's shape; v0.1 attends in a sliding window. Ministral: in some layers."""

from quire_engine.models.base import base_spec, layer_windows
from quire_engine.spec import Config, DecoderSpec


def spec(config: Config) -> DecoderSpec:
    """One window for all layers; null means none."""
    return base_spec(config, windows=layer_windows(config, config["num_hidden_layers"], "sliding_attention"))
