"""Phi 1, 1.5 and 2: attention and feed-forward side by side after one LayerNorm, part of a head rotates."""

from quire_kernels.norm import Norm

from quire_engine.errors import ModelError
from quire_engine.models.base import activation_of, base_spec, need, rotary_of
from quire_engine.spec import Config, DecoderSpec, Names


def spec(config: Config) -> DecoderSpec:
    """Biases everywhere, the head's included."""
    norm = Norm(config.get("layer_norm_eps", 1e-5), "layer")
    if config.get("qk_layernorm"):
        raise ModelError("qk_layernorm is true; Phi is served without it")
    head_dim = need(config, "hidden_size") // need(config, "num_attention_heads")
    return base_spec(
        config,
        names=Names(norm="model.final_layernorm", output="dense", mlp_norm="", gate="", up="fc1", down="fc2"),
        norm=norm,
        norm_bias=True,
        parallel=True,
        rope=rotary_of(config, head_dim, fraction=0.5),
        activation=activation_of(config, "gelu_new"),
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        head_bias=True,
    )
