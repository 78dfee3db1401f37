"""GPT-2 and StarCoder 1: learned positions, LayerNorm, queries, keys and values in one tensor."""

from typing import Literal

from quire_kernels.norm import Norm

from quire_engine.errors import ModelError
from quire_engine.models.base import activation_of
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
    if config["scale_attn_by_inverse_layer_idx"]:
        raise ModelError("scale_attn_by_inverse_layer_idx is true; GPT-2 is served without it")
    return _spec(config, config["n_head"], "stacked", transposed=True)


def gpt_bigcode(config: Config) -> DecoderSpec:
    """`multi_query`: one key-value head; else each head's query, key and value follow one another."""
    single = bool(config["multi_query"])
    return _spec(config, 1 if single else config["n_head"], "stacked" if single else "grouped")


def _spec(
    config: Config, kv_heads: int, qkv: Literal["stacked", "grouped"], *, transposed: bool = False
) -> DecoderSpec:
    heads, hidden = config["n_head"], config["n_embd"]
    return DecoderSpec(
        vocab_size=config["vocab_size"],
        hidden_size=hidden,
        intermediate_size=config["n_inner"] or 4 * hidden,
        num_layers=config["n_layer"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        max_position=config["n_positions"],
        tie_embeddings=bool(config["tie_word_embeddings"]),
        names=_NAMES,
        norm=Norm(config["layer_norm_epsilon"], "layer"),
        norm_bias=True,
        qkv=qkv,
        transposed=transposed,
        attention_scale=None if config["scale_attn_weights"] else 1.0,
        activation=activation_of(config, "activation_function"),
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        ignored=(".attn.bias", ".attn.masked_bias"),
    )
