"""GPT-NeoX and Pythia: each head's query, key and value follow one another in one tensor; part of a head rotates."""

from quire_kernels.norm import Norm

from quire_engine.models.base import base_spec, head_dim_of, rotary_of
from quire_engine.spec import Config, DecoderSpec, Names


def spec(config: Config) -> DecoderSpec:
    """Attention and feed-forward read the residual in parallel, each through a norm of its own."""
    bias = bool(config["attention_bias"])
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
        norm=Norm(config["layer_norm_eps"], "layer"),
        norm_bias=True,
        rope=rotary_of(config, head_dim_of(config), partial=True),
        num_kv_heads=config["num_attention_heads"],
        parallel=bool(config["use_parallel_residual"]),
        qkv="grouped",
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=True,
        ignored=(".attention.bias", ".attention.masked_bias"),
    )
