"""Helium: Llama's shape in which neighbours turn together."""

from quire_engine.models.base import base_spec, rotary_of
from quire_engine.spec import Config, DecoderSpec


def spec(config: Config) -> DecoderSpec:
    """`attention_bias` is for q, k and v."""
    return base_spec(
        config,
        rope=rotary_of(config, config.get("head_dim") or 128, interleaved=True),
        qkv_bias=bool(config.get("attention_bias", False)),
    )
