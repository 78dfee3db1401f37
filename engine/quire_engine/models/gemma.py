"""Gemma 1, 2 and 3 (text): the norm's factor is 1 + weight, embeddings are scaled by the root of their width.

Gemma 2 adds norms of what attention and feed-forward give, soft-caps and a window on every other layer; Gemma 3 norms
queries and keys instead of the soft-caps, has one full layer in six, and another RoPE base in the others.
"""

import dataclasses

from quire_kernels.norm import Norm

from quire_engine.errors import ModelError
from quire_engine.models.base import activation_of, base_spec, layer_windows, need, rotary_of
from quire_engine.spec import Config, DecoderSpec, Names, QKNorm, Rotary

_SANDWICH = Names(
    after_attention="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)


def gemma(config: Config) -> DecoderSpec:
    """hidden_act is "gelu" in old configs and meant tanh's approximation."""
    return base_spec(
        {"head_dim": 256, **config},
        norm=Norm(config.get("rms_norm_eps", 1e-6), unit_offset=True),
        activation=activation_of({"hidden_activation": config.get("hidden_activation") or "gelu_pytorch_tanh"}),
        embedding_scale=need(config, "hidden_size") ** 0.5,
        tie_embeddings=bool(config.get("tie_word_embeddings", True)),
    )


def gemma2(config: Config) -> DecoderSpec:
    """Even layers have the window where `layer_types` says nothing."""
    layers = need(config, "num_hidden_layers")
    kinds = config.get("layer_types") or ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    return dataclasses.replace(
        gemma(config),
        names=_SANDWICH,
        windows=layer_windows({"sliding_window": 4096, **config, "layer_types": kinds}, layers),
        attention_scale=config.get("query_pre_attn_scalar", 256) ** -0.5,
        soft_cap=config.get("attn_logit_softcapping", 50.0) or 0.0,
        logits_soft_cap=config.get("final_logit_softcapping", 30.0) or 0.0,
    )


def gemma3(config: Config) -> DecoderSpec:
    """`sliding_window_pattern` in old configs: every so many layers is a full one."""
    if config.get("use_bidirectional_attention"):
        raise ModelError("use_bidirectional_attention is true; Gemma 3 is served with causal attention")
    layers, every = need(config, "num_hidden_layers"), config.get("sliding_window_pattern", 6)
    kinds = config.get("layer_types") or [
        "sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)
    ]
    base = gemma({"rope_theta": 1e6, **config})
    if "sliding_attention" in (config.get("rope_parameters") or {}):
        local = rotary_of(config, base.head_dim, layer_type="sliding_attention")
    else:
        local = Rotary(theta=config.get("rope_local_base_freq", 1e4), dim=base.head_dim)
    return dataclasses.replace(
        base,
        names=_SANDWICH,
        windows=layer_windows({"sliding_window": 4096, **config, "layer_types": kinds}, layers),
        local_rope=local,
        qk_norm=QKNorm(norm=base.norm),
        attention_scale=config.get("query_pre_attn_scalar", 256) ** -0.5,
        soft_cap=config.get("attn_logit_softcapping") or 0.0,
        logits_soft_cap=config.get("final_logit_softcapping") or 0.0,
    )
