"""Falcon 1 and 2: queries, keys and values in one tensor, group by group; attention and feed-forward side by side."""

from quire_kernels.norm import Norm

from quire_engine.models.base import activation_of, base_spec, head_dim_of, rotary_of
from quire_engine.spec import Config, DecoderSpec, Names


def spec(config: Config) -> DecoderSpec:
    """40B and 180B (`new_decoder_architecture`) have two norms and groups, 7B one norm and one key-value head, the RW
    models ALiBi."""
    heads = config["num_attention_heads"]
    new = bool(config["new_decoder_architecture"])
    kv_heads = heads
    if new:
        kv_heads = config["num_kv_heads"]
    elif config["multi_query"]:
        kv_heads = 1
    parallel = new or bool(config["parallel_attn"])
    two = new and config["num_ln_in_parallel_attn"] != 1
    bias = bool(config["bias"])
    alibi = bool(config["alibi"])
    head_dim = head_dim_of(config)
    return base_spec(
        config,
        names=Names(
            embedding="transformer.word_embeddings",
            layers="transformer.h",
            norm="transformer.ln_f",
            attention="self_attention",
            q="query_key_value",
            output="dense",
            gate="",
            up="dense_h_to_4h",
            down="dense_4h_to_h",
            attention_norm="ln_attn" if two else "input_layernorm",
            mlp_norm="ln_mlp" if two else "" if parallel else "post_attention_layernorm",
        ),
        norm=Norm(config["layer_norm_epsilon"], "layer"),
        norm_bias=True,
        parallel=parallel,
        intermediate_size=config["ffn_hidden_size"],
        num_kv_heads=kv_heads,
        qkv="grouped",
        rope=None if alibi else rotary_of(config, head_dim),
        alibi=head_dim**-0.5 if alibi else 0.0,
        activation=activation_of(config, "activation"),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
    )
