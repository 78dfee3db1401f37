"""Phi 1, 1.5 and 2: attention and feed-forward side by side after one LayerNorm, part of a head rotates."""

from quire_kernels.norm import Norm

from quire_engine.errors import ModelError
from quire_engine.models.base import base_spec, head_dim_of, rotary_of
from quire_engine.spec import Config, DecoderSpec, Names


def spec(config: Config) -> DecoderSpec:
    """Biases everywhere, the head's included."""
    norm = Norm(config["layer_norm_eps"], "layer")
    if config["qk_layernorm"]:
        raise ModelError("qk_layernorm is true; Phi is served without it")
    return base_spec(
        config,
        names=Names(norm="model.final_layernorm", output="dense", mlp_norm="", gate="", up="fc1", down="fc2"),
        norm=norm,
        norm_bias=True,
        rope=rotary_of(config, head_dim_of(config), partial=True),
        parallel=True,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        head_bias=True,
    )
