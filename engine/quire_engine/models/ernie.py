"""ERNIE 4.5, dense and with experts: neighbours turn together."""

import dataclasses

from quire_engine.models.base import base_spec, head_dim_of, need, rotary_of
from quire_engine.spec import Config, DecoderSpec, ExpertsSpec


def ernie(config: Config) -> DecoderSpec:
    """`use_bias` covers every projection."""
    bias = bool(config["use_bias"])
    return base_spec(
        config,
        rope=rotary_of(config, head_dim_of(config), interleaved=True),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
    )


def ernie_moe(config: Config) -> DecoderSpec:
    """Layers from `moe_layer_start_index` to `moe_layer_end_index`, every `moe_layer_interval`th, have experts."""
    layers, inner = config["num_hidden_layers"], config["moe_intermediate_size"]
    first, last = config["moe_layer_start_index"], config["moe_layer_end_index"]
    mixed = {i for i in range(first, last + 1) if (i + 1) % config["moe_layer_interval"] == 0}
    experts = ExpertsSpec(
        num_experts=need(config, "moe_num_experts"),
        top_k=need(config, "moe_k"),
        intermediate_size=inner,
        dense_layers=frozenset(range(layers)) - mixed,
        correction_bias="moe_statics.e_score_correction_bias",
        shared_size=inner * (config["moe_num_shared_experts"] or 0),
    )
    return dataclasses.replace(ernie(config), head_bias=bool(config["use_bias"]), experts=experts)
