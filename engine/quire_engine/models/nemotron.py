"""Nemotron 3 and 4 (Minitron): LayerNorm with 1 + weight, half a head rotates, squared ReLU without a gate."""

from quire_kernels.norm import Norm

from quire_engine.models.base import activation_of, base_spec, need, rotary_of
from quire_engine.spec import Config, DecoderSpec, Names


def spec(config: Config) -> DecoderSpec:
    """head_dim may be explicit."""
    head_dim = config.get("head_dim") or need(config, "hidden_size") // need(config, "num_attention_heads")
    bias = bool(config.get("attention_bias", False))
    return base_spec(
        config,
        names=Names(gate=""),
        norm=Norm(config.get("norm_eps", 1e-5), "layer", unit_offset=True),
        norm_bias=True,
        rope=rotary_of(config, head_dim, fraction=0.5),
        activation=activation_of(config, "relu2"),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
    )
