"""Seed-OSS: Llama's shape, with a bias on o apart from that on q, k and v."""

from quire_engine.models.base import base_spec
from quire_engine.spec import Config, DecoderSpec


def spec(config: Config) -> DecoderSpec:
    """head_dim is explicit."""
    return base_spec(
        config,
        qkv_bias=bool(config["attention_bias"]),
        output_bias=bool(config["attention_out_bias"]),
        mlp_bias=bool(config["mlp_bias"]),
    )
