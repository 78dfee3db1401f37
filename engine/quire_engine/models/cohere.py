"""Command R, R+, R7B and A, Aya: LayerNorm without bias, attention and feed-forward side by side, scaled logits."""

import dataclasses

from quire_kernels.norm import Norm

from quire_engine.models.base import base_spec, head_dim_of, layer_windows, rotary_of
from quire_engine.spec import Config, DecoderSpec, Names, QKNorm


def cohere(config: Config) -> DecoderSpec:
    """`use_qk_norm` (R+, no field of R7B): a norm of every query and key head, each with weights of its own."""
    norm = Norm(config["layer_norm_eps"], "layer")
    bias = bool(config["attention_bias"])
    return base_spec(
        config,
        names=Names(mlp_norm=""),
        norm=norm,
        parallel=True,
        rope=rotary_of(config, head_dim_of(config), interleaved=True),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=QKNorm(norm=norm, over="each_head") if config.get("use_qk_norm") else None,
        logits_scale=config["logit_scale"],
    )


def cohere2(config: Config) -> DecoderSpec:
    """Only layers with the window rotate."""
    return dataclasses.replace(
        cohere(config),
        windows=layer_windows(config),
        without_rope=frozenset(i for i, kind in enumerate(config["layer_types"]) if kind == "full_attention"),
    )
