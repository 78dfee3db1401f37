"""Qwen3 with experts: Qwen3-30B-A3B, Qwen3-235B-A22B."""

import dataclasses

from quire_engine.models import qwen3
from quire_engine.spec import Config, DecoderSpec, ExpertsSpec


def dense_layers(config: Config) -> frozenset[int]:
    """Every `decoder_sparse_step`th layer has experts, but for those in `mlp_only_layers`."""
    step, dense = config["decoder_sparse_step"], config["mlp_only_layers"] or []
    return frozenset(i for i in range(config["num_hidden_layers"]) if i in dense or (i + 1) % step)


def spec(config: Config) -> DecoderSpec:
    """Every layer, but for the dense ones."""
    experts = ExpertsSpec(
        num_experts=config["num_local_experts"],
        top_k=config["num_experts_per_tok"],
        intermediate_size=config["moe_intermediate_size"],
        renormalize=bool(config["norm_topk_prob"]),
        dense_layers=dense_layers(config),
    )
    return dataclasses.replace(qwen3.spec(config), experts=experts)
