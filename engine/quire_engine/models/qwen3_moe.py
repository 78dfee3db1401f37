"""Qwen3 with experts: Qwen3-30B-A3B, Qwen3-235B-A22B."""

import dataclasses

from quire_engine.models import qwen3
from quire_engine.models.base import need
from quire_engine.spec import Config, DecoderSpec, ExpertsSpec


def dense_layers(config: Config) -> frozenset[int]:
    """Every `decoder_sparse_step`th layer has experts, but for those in `mlp_only_layers`."""
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    return frozenset(i for i in range(need(config, "num_hidden_layers")) if i in dense or (i + 1) % step)


def spec(config: Config) -> DecoderSpec:
    """`norm_topk_prob` is off where the config leaves it out."""
    experts = ExpertsSpec(
        num_experts=need(config, "num_experts", "num_local_experts"),
        top_k=need(config, "num_experts_per_tok"),
        intermediate_size=need(config, "moe_intermediate_size"),
        renormalize=bool(config.get("norm_topk_prob", False)),
        dense_layers=dense_layers(config),
    )
    return dataclasses.replace(qwen3.spec(config), experts=experts)
