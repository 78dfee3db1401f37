"""GLM-4 (9B, 0414, Z1) and GLM-4.5 to 4.7: part of a head rotates; neighbours turn together in the dense ones."""

import dataclasses

from quire_kernels.norm import Norm

from quire_engine.models.base import base_spec, head_dim_of, rotary_of
from quire_engine.models.deepseek import experts_of, mtp_of
from quire_engine.spec import Config, DecoderSpec, Names, QKNorm

_GLM = Names(gate="gate_up_proj", up="gate_up_proj")


def glm(config: Config) -> DecoderSpec:
    """`attention_bias` is for q, k and v."""
    return base_spec(
        config,
        names=_GLM,
        rope=rotary_of(config, head_dim_of(config), interleaved=True, partial=True),
        qkv_bias=bool(config["attention_bias"]),
    )


def glm4(config: Config) -> DecoderSpec:
    """Norms of what attention and feed-forward give, besides."""
    names = dataclasses.replace(_GLM, after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm")
    return dataclasses.replace(glm(config), names=names)


def glm4_moe(config: Config) -> DecoderSpec:
    """DeepSeek-V3's router over plain attention."""
    return base_spec(
        config,
        rope=rotary_of(config, head_dim_of(config), partial=True),
        qkv_bias=bool(config["attention_bias"]),
        qk_norm=QKNorm(norm=Norm(config["rms_norm_eps"])) if config["use_qk_norm"] else None,
        experts=experts_of(config),
        extra_layers=int(config.get("num_nextn_predict_layers") or 0),
        mtp=mtp_of(config),
    )
