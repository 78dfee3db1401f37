"""Command R, R+, R7B and A, Aya: LayerNorm without bias, attention and feed-forward side by side, scaled logits."""

import dataclasses

from quire_kernels.norm import Norm

from quire_engine.models.base import base_spec, layer_windows, need, rotary_of
from quire_engine.spec import Config, DecoderSpec, Names, QKNorm


def cohere(config: Config) -> DecoderSpec:
    """`use_qk_norm` (R+): a norm of every query and key head, each with weights of its own."""
    norm = Norm(config.get("layer_norm_eps", 1e-5), "layer")
    head_dim = config.get("head_dim") or need(config, "hidden_size") // need(config, "num_attention_heads")
    bias = bool(config.get("attention_bias", False))
    return base_spec(
        config,
        names=Names(mlp_norm=""),
        norm=norm,
        parallel=True,
        rope=rotary_of(config, head_dim, interleaved=True),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=QKNorm(norm=norm, over="each_head") if config.get("use_qk_norm") else None,
        logits_scale=config.get("logit_scale", 0.0625),
        tie_embeddings=bool(config.get("tie_word_embeddings", True)),
    )


def cohere2(config: Config) -> DecoderSpec:
    """Only layers with the window rotate; every fourth has none."""
    layers, every = need(config, "num_hidden_layers"), config.get("sliding_window_pattern", 4)
    kinds = config.get("layer_types") or [
        "sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)
    ]
    return dataclasses.replace(
        cohere(config),
        windows=layer_windows({"sliding_window": 4096, **config, "layer_types": kinds}, layers),
        without_rope=frozenset(i for i, kind in enumerate(kinds) if kind == "full_attention"),
    )
