"""Gemma 1, 2 and 3 (text): the norm's factor is 1 + weight, embeddings are scaled by the root of their width.

Gemma 2 adds norms of what attention and feed-forward give, soft-caps and a window on every other layer; Gemma 3 norms
queries and keys instead of the soft-caps, has one full layer in six, and another RoPE base in the others.
"""

import dataclasses

from quire_kernels.norm import Norm

from quire_engine.errors import ModelError
from quire_engine.models.base import activation_of, base_spec, layer_windows, rotary_of
from quire_engine.spec import Config, DecoderSpec, Names, QKNorm

_SANDWICH = Names(
    after_attention="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)


def gemma(config: Config) -> DecoderSpec:
    """Raises ModelError for attention that is not causal."""
    return _spec(config, "hidden_act")


def _spec(config: Config, activation: str) -> DecoderSpec:
    if config.get("use_bidirectional_attention"):  # no field of older versions of transformers
        raise ModelError("use_bidirectional_attention is true; Gemma is served with causal attention")
    bias = bool(config["attention_bias"])
    return base_spec(
        config,
        norm=Norm(config["rms_norm_eps"], unit_offset=True),
        activation=activation_of(config, activation),
        embedding_scale=config["hidden_size"] ** 0.5,
        qkv_bias=bias,
        output_bias=bias,
    )


def gemma2(config: Config) -> DecoderSpec:
    """Every other layer has the window in the published models."""
    return dataclasses.replace(
        _spec(config, "hidden_activation"),
        names=_SANDWICH,
        windows=layer_windows(config),
        attention_scale=config["query_pre_attn_scalar"] ** -0.5,
        soft_cap=config["attn_logit_softcapping"] or 0.0,
        logits_soft_cap=config["final_logit_softcapping"] or 0.0,
    )


def gemma3(config: Config) -> DecoderSpec:
    """Layers with the window have a RoPE of their own. transformers reads no `attn_logit_softcapping` here."""
    base = _spec(config, "hidden_activation")
    return dataclasses.replace(
        base,
        names=_SANDWICH,
        windows=layer_windows(config),
        local_rope=rotary_of(config, base.head_dim, layer_type="sliding_attention"),
        qk_norm=QKNorm(norm=base.norm),
        attention_scale=config["query_pre_attn_scalar"] ** -0.5,
        logits_soft_cap=config["final_logit_softcapping"] or 0.0,
    )
