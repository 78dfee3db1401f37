"""ERNIE 4.5, dense and with experts: neighbours turn together."""

import dataclasses

from quire_engine.models.base import base_spec, need, rotary_of
from quire_engine.spec import Config, DecoderSpec, ExpertsSpec


def ernie(config: Config) -> DecoderSpec:
    """`use_bias` covers every projection."""
    bias = bool(config.get("use_bias", False))
    head_dim = config.get("head_dim") or need(config, "hidden_size") // need(config, "num_attention_heads")
    return base_spec(
        config,
        rope=rotary_of(config, head_dim, interleaved=True, theta=500000.0),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        tie_embeddings=bool(config.get("tie_word_embeddings", True)),
    )


def ernie_moe(config: Config) -> DecoderSpec:
    """Layers from `moe_layer_start_index` to `moe_layer_end_index`, every `moe_layer_interval`th, have experts."""
    layers, start = need(config, "num_hidden_layers"), config.get("moe_layer_start_index", 1)
    end, every = config.get("moe_layer_end_index", -1), config.get("moe_layer_interval", 1)
    end = layers - 1 if end < 0 else end
    mixed = {i for i in range(start, end + 1) if (i + 1) % every == 0}
    inner = need(config, "moe_intermediate_size")
    experts = ExpertsSpec(
        num_experts=need(config, "moe_num_experts", "num_local_experts", "num_experts"),
        top_k=need(config, "moe_k", "num_experts_per_tok"),
        intermediate_size=inner,
        dense_layers=frozenset(range(layers)) - mixed,
        correction_bias="moe_statics.e_score_correction_bias",
        shared_size=inner * config.get("moe_num_shared_experts", 0),
    )
    return dataclasses.replace(ernie(config), experts=experts)
