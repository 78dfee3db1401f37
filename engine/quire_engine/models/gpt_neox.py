"""GPT-NeoX and Pythia: each head's query, key and value follow one another in one tensor; part of a head rotates."""

from quire_kernels.norm import Norm

from quire_engine.models.base import activation_of, base_spec, need, rotary_of
from quire_engine.spec import Config, DecoderSpec, Names


def spec(config: Config) -> DecoderSpec:
    """Attention and feed-forward read the residual in parallel, each through a norm of its own."""
    head_dim = need(config, "hidden_size") // need(config, "num_attention_heads")
    bias = bool(config.get("attention_bias", True))
    return base_spec(
        config,
        names=Names(
            embedding="gpt_neox.embed_in",
            layers="gpt_neox.layers",
            norm="gpt_neox.final_layer_norm",
            head="embed_out",
            attention="attention",
            q="query_key_value",
            output="dense",
            gate="",
            up="dense_h_to_4h",
            down="dense_4h_to_h",
        ),
        norm=Norm(config.get("layer_norm_eps", 1e-5), "layer"),
        norm_bias=True,
        num_kv_heads=need(config, "num_attention_heads"),
        parallel=bool(config.get("use_parallel_residual", True)),
        qkv="grouped",
        rope=rotary_of(config, head_dim, fraction=config.get("rotary_pct", 0.25)),
        activation=activation_of(config, "gelu"),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=True,
        ignored=(".attention.bias", ".attention.masked_bias"),
    )
