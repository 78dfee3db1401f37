"""Qwen1.5 and 2 with experts: one more that every token goes through, weighed by a gate of its own."""

import dataclasses

from quire_engine.models import qwen2
from quire_engine.models.qwen3_moe import dense_layers
from quire_engine.models.spec import Config, DecoderSpec, ExpertsSpec, need


def spec(config: Config) -> DecoderSpec:
    """`qkv_bias` is on where the config leaves it out."""
    experts = ExpertsSpec(
        num_experts=need(config, "num_experts", "num_local_experts"),
        top_k=need(config, "num_experts_per_tok"),
        intermediate_size=need(config, "moe_intermediate_size"),
        renormalize=bool(config.get("norm_topk_prob", False)),
        dense_layers=dense_layers(config),
        shared_size=need(config, "shared_expert_intermediate_size"),
        shared="shared_expert",
        shared_gate="shared_expert_gate",
    )
    return dataclasses.replace(qwen2.spec(config), experts=experts, qkv_bias=bool(config.get("qkv_bias", True)))
