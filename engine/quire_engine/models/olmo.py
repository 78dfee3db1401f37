"""OLMo 1 to 3 and OLMoE. From OLMo 2 on the norms come after attention and feed-forward, not before them."""

import dataclasses

from quire_kernels.norm import Norm

from quire_engine.models import llama
from quire_engine.models.base import layer_windows, need, rotary_of
from quire_engine.spec import Config, DecoderSpec, ExpertsSpec, Names, QKNorm, Rotary

_AFTER = Names(
    attention_norm="",
    after_attention="post_attention_layernorm",
    mlp_norm="",
    after_mlp="post_feedforward_layernorm",
)


def olmo(config: Config) -> DecoderSpec:
    """LayerNorm without weights."""
    return dataclasses.replace(
        llama.spec(config), norm=Norm(1e-5, "layer"), norm_weight=False, clip_qkv=config.get("clip_qkv")
    )


def olmo2(config: Config) -> DecoderSpec:
    """Queries and keys are normed over their full width."""
    base = llama.spec(config)
    return dataclasses.replace(
        base, names=_AFTER, qk_norm=QKNorm(norm=Norm(config.get("rms_norm_eps", 1e-5)), over="width")
    )


def olmo3(config: Config) -> DecoderSpec:
    """Three layers of four have a window; the RoPE scaling is for the others."""
    layers = need(config, "num_hidden_layers")
    kinds = config.get("layer_types") or [
        "sliding_attention" if (i + 1) % 4 else "full_attention" for i in range(layers)
    ]
    base = olmo2(config)
    if "sliding_attention" in (config.get("rope_parameters") or {}):
        local = rotary_of(config, base.head_dim, layer_type="sliding_attention")
    else:
        assert base.rope is not None
        local = Rotary(theta=base.rope.theta, dim=base.head_dim)
    windows = layer_windows({"sliding_window": 4096, **config, "layer_types": kinds}, layers)
    return dataclasses.replace(base, windows=windows, local_rope=local)


def olmoe(config: Config) -> DecoderSpec:
    """Experts in every layer; norms before, as in Llama."""
    experts = ExpertsSpec(
        num_experts=need(config, "num_experts", "num_local_experts"),
        top_k=need(config, "num_experts_per_tok"),
        intermediate_size=need(config, "intermediate_size"),
        renormalize=bool(config.get("norm_topk_prob", False)),
    )
    return dataclasses.replace(
        llama.spec(config),
        clip_qkv=config.get("clip_qkv"),
        qk_norm=QKNorm(norm=Norm(config.get("rms_norm_eps", 1e-5)), over="width"),
        experts=experts,
    )
