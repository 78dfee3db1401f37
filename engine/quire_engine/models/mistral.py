"""Mistral: Llama's shape; v0.1 attends in a sliding window. Ministral: in some layers. Ministral 3: queries grow."""

import dataclasses

from quire_engine.models.base import base_spec, layer_windows
from quire_engine.spec import Config, DecoderSpec


def spec(config: Config) -> DecoderSpec:
    """A window of null means none. CWM alone has an mlp_bias."""
    return base_spec(config, windows=layer_windows(config), mlp_bias=bool(config.get("mlp_bias")))


def ministral3(config: Config) -> DecoderSpec:
    """The further on in a long text, the sharper it attends (as Llama 4 does)."""
    rope = config["rope_parameters"]
    by = rope.get("llama_4_scaling_beta")
    growth = (float(by), int(rope["original_max_position_embeddings"])) if by else None
    return dataclasses.replace(spec(config), query_growth=growth)
