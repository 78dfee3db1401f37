"""Nemotron 3 and 4 (Minitron): LayerNorm with 1 + weight, half a head rotates, squared ReLU without a gate."""

from quire_kernels.norm import Norm

from quire_engine.models.base import base_spec, head_dim_of, rotary_of
from quire_engine.spec import Config, DecoderSpec, Names


def spec(config: Config) -> DecoderSpec:
    """Biases where the config says so."""
    bias = bool(config["attention_bias"])
    return base_spec(
        config,
        names=Names(gate=""),
        norm=Norm(config["norm_eps"], "layer", unit_offset=True),
        norm_bias=True,
        rope=rotary_of(config, head_dim_of(config), partial=True),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bool(config["mlp_bias"]),
    )
