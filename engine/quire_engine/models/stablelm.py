"""StableLM 2 and Zephyr: LayerNorm, a quarter of a head rotates; the 12B computes both parts side by side."""

from quire_kernels.norm import Norm

from quire_engine.models.base import base_spec, need, rotary_of
from quire_engine.spec import Config, DecoderSpec, Names, QKNorm


def spec(config: Config) -> DecoderSpec:
    """`use_qkv_bias`, `qk_layernorm` and `use_parallel_residual` tell the sizes apart."""
    norm = Norm(config.get("layer_norm_eps", 1e-5), "layer")
    parallel = bool(config.get("use_parallel_residual", False))
    head_dim = need(config, "hidden_size") // need(config, "num_attention_heads")
    return base_spec(
        config,
        names=Names(
            q_norm="q_layernorm", k_norm="k_layernorm", mlp_norm="" if parallel else "post_attention_layernorm"
        ),
        norm=norm,
        norm_bias=True,
        parallel=parallel,
        rope=rotary_of(config, head_dim, fraction=0.25),
        qkv_bias=bool(config.get("use_qkv_bias", False)),
        qk_norm=QKNorm(norm=norm, over="each_head", lists=True) if config.get("qk_layernorm") else None,
    )
