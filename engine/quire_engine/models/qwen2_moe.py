"""Qwen1.5 and 2 with experts: one more that every token goes through, weighed by a gate of its own."""

import dataclasses
from typing import Any

from quire_engine.models import qwen2
from quire_engine.models.qwen3_moe import dense_layers
from quire_engine.spec import Config, DecoderSpec, ExpertsSpec


def experts_of(config: Config, **facts: Any) -> ExpertsSpec:
    """One of them for all tokens, gated. `facts` adds."""
    return ExpertsSpec(
        num_experts=config["num_experts"],
        top_k=config["num_experts_per_tok"],
        intermediate_size=config["moe_intermediate_size"],
        shared_size=config["shared_expert_intermediate_size"],
        shared="shared_expert",
        shared_gate="shared_expert_gate",
        **facts,
    )


def spec(config: Config) -> DecoderSpec:
    """`qkv_bias` is a field."""
    experts = experts_of(config, renormalize=bool(config["norm_topk_prob"]), dense_layers=dense_layers(config))
    return dataclasses.replace(qwen2.spec(config), experts=experts, qkv_bias=bool(config["qkv_bias"]))
