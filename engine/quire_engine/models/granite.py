"""Granite 3: Llama's shape with multipliers; experts in tensors that hold all of them, and one for all tokens."""

import dataclasses

from quire_engine.models import llama
from quire_engine.spec import Config, DecoderSpec, ExpertsSpec


def granite(config: Config) -> DecoderSpec:
    """Logits are divided by `logits_scaling`."""
    return dataclasses.replace(
        llama.spec(config),
        embedding_scale=config["embedding_multiplier"],
        residual_scale=config["residual_multiplier"],
        attention_scale=config["attention_multiplier"],
        logits_scale=1.0 / config["logits_scaling"],
    )


def granite_moe(config: Config) -> DecoderSpec:
    """`shared_intermediate_size` is of the shared expert (GraniteMoeShared)."""
    base = granite(config)
    experts = ExpertsSpec(
        num_experts=config["num_local_experts"],
        top_k=config["num_experts_per_tok"],
        intermediate_size=base.intermediate_size,
        at="block_sparse_moe",
        router="router.layer",
        experts="",
        up="input_linear.weight",
        down="output_linear.weight",
        stacked=True,
    )
    if shared := config.get("shared_intermediate_size"):
        experts = dataclasses.replace(experts, shared_size=shared, shared="shared_mlp", shared_beside=True)
    names = dataclasses.replace(base.names, gate="input_linear", up="input_linear", down="output_linear")
    return dataclasses.replace(base, names=names, experts=experts)
