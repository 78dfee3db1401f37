"""GLM-4 (9B, 0414, Z1) and GLM-4.5 to 4.7: part of a head rotates; neighbours turn together in the dense ones."""

import dataclasses

from quire_kernels.norm import Norm

from quire_engine.layers.rotary import rotary_of
from quire_engine.models.spec import Config, DecoderSpec, ExpertsSpec, Names, QKNorm, base_spec, need

_GLM = Names(gate="gate_up_proj", up="gate_up_proj")


def glm(config: Config) -> DecoderSpec:
    """`attention_bias` is for q, k and v."""
    head_dim = config.get("head_dim") or 128
    return base_spec(
        config,
        names=_GLM,
        head_dim=head_dim,
        rope=rotary_of(config, head_dim, interleaved=True, fraction=0.5),
        qkv_bias=bool(config.get("attention_bias", True)),
    )


def glm4(config: Config) -> DecoderSpec:
    """Norms of what attention and feed-forward give, besides."""
    names = dataclasses.replace(_GLM, after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm")
    return dataclasses.replace(glm(config), names=names, qkv_bias=bool(config.get("attention_bias", False)))


def glm4_moe(config: Config) -> DecoderSpec:
    """DeepSeek-V3's router over plain attention."""
    head_dim = config.get("head_dim") or 128
    layers, dense = need(config, "num_hidden_layers"), config.get("first_k_dense_replace", 1)
    experts = ExpertsSpec(
        num_experts=need(config, "n_routed_experts", "num_local_experts"),
        top_k=need(config, "num_experts_per_tok"),
        intermediate_size=need(config, "moe_intermediate_size"),
        score="sigmoid",
        renormalize=bool(config.get("norm_topk_prob", True)),
        scale=config.get("routed_scaling_factor", 1.0),
        groups=config.get("n_group") or 1,
        top_groups=config.get("topk_group") or 1,
        correction_bias="gate.e_score_correction_bias",
        shared_size=need(config, "moe_intermediate_size") * config.get("n_shared_experts", 1),
        dense_layers=frozenset(range(min(dense, layers))),
    )
    return base_spec(
        config,
        head_dim=head_dim,
        rope=rotary_of(config, head_dim, fraction=0.5),
        qkv_bias=bool(config.get("attention_bias", False)),
        qk_norm=QKNorm(norm=Norm(config.get("rms_norm_eps", 1e-5))) if config.get("use_qk_norm") else None,
        experts=experts,
        extra_layers=config.get("num_nextn_predict_layers") or 0,
    )
