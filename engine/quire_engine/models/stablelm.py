"""StableLM 2 and Zephyr: LayerNorm, a quarter of a head rotates; the 12B computes both parts side by side."""

from quire_kernels.norm import Norm

from quire_engine.models.base import base_spec, head_dim_of, rotary_of
from quire_engine.spec import Config, DecoderSpec, Names, QKNorm


def spec(config: Config) -> DecoderSpec:
    """`use_qkv_bias`, `qk_layernorm` and `use_parallel_residual` tell the sizes apart."""
    norm = Norm(config["layer_norm_eps"], "layer")
    parallel = bool(config["use_parallel_residual"])
    return base_spec(
        config,
        names=Names(
            q_norm="q_layernorm", k_norm="k_layernorm", mlp_norm="" if parallel else "post_attention_layernorm"
        ),
        norm=norm,
        norm_bias=True,
        rope=rotary_of(config, head_dim_of(config), partial=True),
        parallel=parallel,
        qkv_bias=bool(config["use_qkv_bias"]),
        qk_norm=QKNorm(norm=norm, over="each_head", lists=True) if config["qk_layernorm"] else None,
    )
