"""GLM-4 (9B, 0414, Z1) and GLM-4.5 to 4.7: part of a head rotates; neighbours turn together in the dense ones."""

import dataclasses

from quire_kernels.norm import Norm

from quire_engine.models.base import base_spec, rotary_of
from quire_engine.models.deepseek import experts_of
from quire_engine.spec import Config, DecoderSpec, Names, QKNorm

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
    return base_spec(
        config,
        head_dim=head_dim,
        rope=rotary_of(config, head_dim, fraction=0.5),
        qkv_bias=bool(config.get("attention_bias", False)),
        qk_norm=QKNorm(norm=Norm(config.get("rms_norm_eps", 1e-5))) if config.get("use_qk_norm") else None,
        experts=experts_of({"first_k_dense_replace": 1, **config}),
        extra_layers=config.get("num_nextn_predict_layers") or 0,
    )
