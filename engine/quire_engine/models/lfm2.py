"""LFM2: gated short convolutions, and attention in some layers; the larger ones have experts."""

import dataclasses

from quire_kernels.activation import Activation
from quire_kernels.norm import Norm

from quire_engine.models.base import base_spec, need
from quire_engine.spec import Config, DecoderSpec, ExpertsSpec, Names, QKNorm, ShortConvSpec


def lfm2(config: Config) -> DecoderSpec:
    """`block_auto_adjust_ff_dim` takes two thirds of the feed-forward size, rounded up."""
    kinds, norm = need(config, "layer_types"), Norm(config["norm_eps"])
    inner = config["intermediate_size"]
    if config["block_auto_adjust_ff_dim"]:
        step = config["block_multiple_of"]
        inner = -(-int(2 * inner / 3 * config["block_ffn_dim_multiplier"]) // step) * step
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
        activation=Activation.SILU,
        qk_norm=QKNorm(norm=norm),
        recurrent=ShortConvSpec(taps=config["conv_L_cache"], bias=bool(config["conv_bias"])),
        recurrent_layers=frozenset(i for i, kind in enumerate(kinds) if kind == "conv"),
    )


def lfm2_moe(config: Config) -> DecoderSpec:
    """Sigmoid scores, and a bias for the choice alone."""
    experts = ExpertsSpec(
        num_experts=config["num_experts"],
        top_k=config["num_experts_per_tok"],
        intermediate_size=config["moe_intermediate_size"],
        score="sigmoid",
        renormalize=bool(config["norm_topk_prob"]),
        scale=config["routed_scaling_factor"],
        dense_layers=frozenset(range(config["num_dense_layers"])),
        at="feed_forward",
        correction_bias="expert_bias" if config["use_expert_bias"] else "",
        gate="w1",
        up="w3",
        down="w2",
    )
    return dataclasses.replace(lfm2({**config, "block_auto_adjust_ff_dim": False}), experts=experts)
