"""Qwen1.5 and 2 with experts: one more that every token goes through, weighed by a gate of its own."""

import dataclasses

from quire_engine.models import qwen2
from quire_engine.models.base import need
from quire_engine.models.qwen3_moe import dense_layers
from quire_engine.spec import Config, DecoderSpec, ExpertsSpec


def experts_of(config: Config, *, renormalize: bool) -> ExpertsSpec:
    """One of them for all tokens, gated. `renormalize`: where `norm_topk_prob` is not given."""
    return ExpertsSpec(
        num_experts=need(config, "num_experts", "num_local_experts"),
        top_k=need(config, "num_experts_per_tok"),
        intermediate_size=need(config, "moe_intermediate_size"),
        renormalize=bool(config.get("norm_topk_prob", renormalize)),
        dense_layers=dense_layers(config),
        shared_size=need(config, "shared_expert_intermediate_size"),
        shared="shared_expert",
        shared_gate="shared_expert_gate",
    )


def spec(config: Config) -> DecoderSpec:
    """`qkv_bias` is on where the config leaves it out."""
    experts = experts_of(config, renormalize=False)
    return dataclasses.replace(qwen2.spec(config), experts=experts, qkv_bias=bool(config.get("qkv_bias", True)))
