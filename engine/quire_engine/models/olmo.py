"""OLMo 1 to 3 and OLMoE. From OLMo 2 on the norms come after attention and feed-forward, not before them."""

import dataclasses

from quire_kernels.norm import Norm

from quire_engine.models import llama
from quire_engine.models.base import base_spec, layer_windows, rotary_of
from quire_engine.spec import Config, DecoderSpec, ExpertsSpec, Names, QKNorm

_AFTER = Names(
    attention_norm="",
    after_attention="post_attention_layernorm",
    mlp_norm="",
    after_mlp="post_feedforward_layernorm",
)


def olmo(config: Config) -> DecoderSpec:
    """LayerNorm without weights."""
    bias = bool(config["attention_bias"])
    return base_spec(
        config,
        norm=Norm(1e-5, "layer"),
        norm_weight=False,
        qkv_bias=bias,
        output_bias=bias,
        clip_qkv=config["clip_qkv"],
    )


def olmo2(config: Config) -> DecoderSpec:
    """Queries and keys are normed over their full width."""
    base = llama.spec(config)
    return dataclasses.replace(base, names=_AFTER, qk_norm=QKNorm(norm=Norm(config["rms_norm_eps"]), over="width"))


def olmo3(config: Config) -> DecoderSpec:
    """Layers with a window have a RoPE of their own, without the scaling of the others."""
    base = olmo2(config)
    local = rotary_of(config, base.head_dim, layer_type="sliding_attention")
    return dataclasses.replace(base, windows=layer_windows(config), local_rope=local)


def olmoe(config: Config) -> DecoderSpec:
    """Experts in every layer; norms before, as in Llama."""
    experts = ExpertsSpec(
        num_experts=config["num_experts"],
        top_k=config["num_experts_per_tok"],
        intermediate_size=config["intermediate_size"],
        renormalize=bool(config["norm_topk_prob"]),
    )
    return dataclasses.replace(
        llama.spec(config),
        clip_qkv=config["clip_qkv"],
        qk_norm=QKNorm(norm=Norm(config["rms_norm_eps"]), over="width"),
        experts=experts,
    )
