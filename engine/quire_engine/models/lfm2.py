"""LFM2: gated short convolutions, and attention in some layers; the larger ones have experts."""

import dataclasses

from quire_kernels.norm import Norm

from quire_engine.models.base import base_spec, need, rotary_of
from quire_engine.spec import Config, DecoderSpec, ExpertsSpec, Names, QKNorm, ShortConvSpec


def lfm2(config: Config) -> DecoderSpec:
    """`full_attn_idxs` says which layers attend where `layer_types` does not. `block_auto_adjust_ff_dim` takes two
    thirds of the feed-forward size, rounded up."""
    layers = need(config, "num_hidden_layers")
    attends = config.get("full_attn_idxs", range(layers))
    kinds = config.get("layer_types") or ["full_attention" if i in attends else "conv" for i in range(layers)]
    norm = Norm(config.get("norm_eps", 1e-5))
    head_dim = config.get("head_dim") or need(config, "hidden_size") // need(config, "num_attention_heads")
    inner = config.get("block_ff_dim") or need(config, "intermediate_size")
    if config.get("block_auto_adjust_ff_dim", True):
        inner = int(2 * inner / 3 * config.get("block_ffn_dim_multiplier", 1.0))
        step = config.get("block_multiple_of", 256)
        inner = -(-inner // step) * step
    return base_spec(
        config,
        names=Names(
            norm="model.embedding_norm",
            recurrent="conv",
            output="out_proj",
            q_norm="q_layernorm",
            k_norm="k_layernorm",
            mlp="feed_forward",
            gate="w1",
            up="w3",
            down="w2",
            attention_norm="operator_norm",
            mlp_norm="ffn_norm",
        ),
        norm=norm,
        intermediate_size=inner,
        rope=rotary_of(config, head_dim, theta=1000000.0),
        qk_norm=QKNorm(norm=norm),
        recurrent=ShortConvSpec(taps=config.get("conv_L_cache", 3), bias=bool(config.get("conv_bias", False))),
        recurrent_layers=frozenset(i for i, kind in enumerate(kinds) if kind == "conv"),
        tie_embeddings=bool(config.get("tie_embedding", config.get("tie_word_embeddings", True))),
    )


def lfm2_moe(config: Config) -> DecoderSpec:
    """Sigmoid scores, and a bias for the choice alone."""
    experts = ExpertsSpec(
        num_experts=need(config, "num_experts", "num_local_experts"),
        top_k=need(config, "num_experts_per_tok"),
        intermediate_size=need(config, "moe_intermediate_size"),
        score="sigmoid",
        renormalize=bool(config.get("norm_topk_prob", True)),
        scale=config.get("routed_scaling_factor", 1.0),
        dense_layers=frozenset(range(config.get("num_dense_layers", 2))),
        at="feed_forward",
        correction_bias="expert_bias" if config.get("use_expert_bias", True) else "",
        gate="w1",
        up="w3",
        down="w2",
    )
    return dataclasses.replace(lfm2({**config, "block_auto_adjust_ff_dim": False}), experts=experts)
