"""GPT-2 and StarCoder 1: learned positions, LayerNorm, queries, keys and values in one tensor."""

from typing import Literal

from quire_kernels.norm import Norm

from quire_engine.errors import ModelError
from quire_engine.models.base import activation_of, need
from quire_engine.spec import Config, DecoderSpec, Names

_NAMES = Names(
    embedding="transformer.wte",
    positions="transformer.wpe",
    layers="transformer.h",
    norm="transformer.ln_f",
    attention="attn",
    q="c_attn",
    output="c_proj",
    gate="",
    up="c_fc",
    down="c_proj",
    attention_norm="ln_1",
    mlp_norm="ln_2",
)


def gpt2(config: Config) -> DecoderSpec:
    """Weights are stored [inputs, outputs]."""
    if config.get("scale_attn_by_inverse_layer_idx"):
        raise ModelError("scale_attn_by_inverse_layer_idx is true; GPT-2 is served without it")
    return _spec(config, need(config, "n_head"), "stacked", transposed=True)


def gpt_bigcode(config: Config) -> DecoderSpec:
    """`multi_query`: one key-value head; else each head's query, key and value follow one another."""
    single = bool(config.get("multi_query", True))
    return _spec(config, 1 if single else need(config, "n_head"), "stacked" if single else "grouped")


def _spec(
    config: Config, kv_heads: int, qkv: Literal["stacked", "grouped"], *, transposed: bool = False
) -> DecoderSpec:
    heads, hidden = need(config, "n_head"), need(config, "n_embd")
    return DecoderSpec(
        vocab_size=need(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=config.get("n_inner") or 4 * hidden,
        num_layers=need(config, "n_layer"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        max_position=need(config, "n_positions"),
        tie_embeddings=bool(config.get("tie_word_embeddings", True)),
        names=_NAMES,
        norm=Norm(config.get("layer_norm_epsilon", 1e-5), "layer"),
        norm_bias=True,
        qkv=qkv,
        transposed=transposed,
        attention_scale=None if config.get("scale_attn_weights", True) else 1.0,
        activation=activation_of(config, "gelu_new"),
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        ignored=(".attn.bias", ".attn.masked_bias"),
    )
