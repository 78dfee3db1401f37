"""Qwen3 with experts: Qwen3-30B-A3B, Qwen3-235B-A22B."""

import dataclasses
from typing import Any

from quire_engine.models import qwen3
from quire_engine.models.spec import DecoderSpec, ExpertsSpec, need


def spec(config: dict[str, Any]) -> DecoderSpec:
    """Every `decoder_sparse_step`th layer has experts, but for those in `mlp_only_layers`."""
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    layers = range(need(config, "num_hidden_layers"))
    experts = ExpertsSpec(
        num_experts=config.get("num_experts") or need(config, "num_local_experts"),
        top_k=need(config, "num_experts_per_tok"),
        intermediate_size=need(config, "moe_intermediate_size"),
        renormalize=bool(config.get("norm_topk_prob", False)),
        dense_layers=frozenset(i for i in layers if i in dense or (i + 1) % step),
    )
    return dataclasses.replace(qwen3.spec(config), experts=experts)
