"""Helium: Llama's shape in which neighbours turn together."""

from quire_engine.models.base import base_spec, head_dim_of, rotary_of
from quire_engine.spec import Config, DecoderSpec


def spec(config: Config) -> DecoderSpec:
    """`attention_bias` is for q, k and v."""
    return base_spec(
        config,
        rope=rotary_of(config, head_dim_of(config), interleaved=True),
        qkv_bias=bool(config["attention_bias"]),
        mlp_bias=bool(config["mlp_bias"]),
    )
