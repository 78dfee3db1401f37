"""Falcon 1 and 2: queries, keys and values in one tensor, group by group; attention and feed-forward side by side."""

from quire_kernels.norm import Norm

from quire_engine.models.base import activation_of, base_spec, need, rotary_of
from quire_engine.spec import Config, DecoderSpec, Names


def spec(config: Config) -> DecoderSpec:
    """40B and 180B (`new_decoder_architecture`) have two norms and groups, 7B one norm and one key-value head, the RW
    models ALiBi."""
    heads, hidden = need(config, "num_attention_heads"), need(config, "hidden_size")
    new = bool(config.get("new_decoder_architecture", False))
    kv_heads = heads
    if new:
        kv_heads = config.get("num_kv_heads") or heads
    elif config.get("multi_query", True):
        kv_heads = 1
    parallel = new or bool(config.get("parallel_attn", True))
    two = new and config.get("num_ln_in_parallel_attn", 2) != 1
    bias = bool(config.get("bias", False))
    alibi = bool(config.get("alibi", False))
    head_dim = hidden // heads
    return base_spec(
        {"max_position_embeddings": 2048, **config},
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
        norm=Norm(config.get("layer_norm_epsilon", 1e-5), "layer"),
        norm_bias=True,
        parallel=parallel,
        intermediate_size=config.get("ffn_hidden_size") or 4 * hidden,
        num_kv_heads=kv_heads,
        qkv="grouped",
        rope=None if alibi else rotary_of(config, head_dim),
        alibi=head_dim**-0.5 if alibi else 0.0,
        activation=activation_of(config, "gelu"),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        tie_embeddings=bool(config.get("tie_word_embeddings", True)),
    )
