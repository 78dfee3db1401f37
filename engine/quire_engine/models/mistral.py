"""Mistral: Llama's shape; v0.1 attends in a sliding window. Ministral: in some layers."""

from quire_engine.models.base import base_spec, layer_windows
from quire_engine.spec import Config, DecoderSpec


def spec(config: Config) -> DecoderSpec:
    """A window of null means none. CWM alone has an mlp_bias."""
    return base_spec(config, windows=layer_windows(config), mlp_bias=bool(config.get("mlp_bias")))
