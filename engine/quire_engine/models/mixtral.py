"""Mixtral: Mistral's attention, and experts under names of their own."""

import dataclasses

from quire_engine.models import mistral
from quire_engine.spec import Config, DecoderSpec, ExpertsSpec


def spec(config: Config) -> DecoderSpec:
    """w1 is the gate, w3 goes up, w2 down."""
    experts = ExpertsSpec(
        num_experts=config["num_local_experts"],
        top_k=config["num_experts_per_tok"],
        intermediate_size=config["intermediate_size"],
        at="block_sparse_moe",
        gate="w1",
        up="w3",
        down="w2",
    )
    return dataclasses.replace(mistral.spec(config), experts=experts)
