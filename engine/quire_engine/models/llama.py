"""Llama 1 to 3.x, and what shares its shape (SmolLM2, TinyLlama, Yi)."""

from quire_engine.models.base import base_spec
from quire_engine.spec import Config, DecoderSpec


def spec(config: Config) -> DecoderSpec:
    """attention_bias covers q, k, v and o alike. Some families of this shape have no mlp_bias."""
    bias = bool(config["attention_bias"])
    return base_spec(config, qkv_bias=bias, output_bias=bias, mlp_bias=bool(config.get("mlp_bias")))
