"""Qwen3-Next and Qwen3.5 (text): three layers of gated DeltaNet to one of attention whose result is gated too."""

import dataclasses

from quire_kernels.norm import Norm

from quire_engine.models.base import base_spec, need, rotary_of
from quire_engine.models.qwen2_moe import experts_of
from quire_engine.spec import Config, DecoderSpec, DeltaNetSpec, Names, QKNorm


def qwen3_5(config: Config) -> DecoderSpec:
    """Norms' factors are 1 + weight. Every `full_attention_interval`th layer attends, where `layer_types` is not
    given. Texts have one position per token, so the three axes of its RoPE are one."""
    layers, every = need(config, "num_hidden_layers"), config.get("full_attention_interval", 4)
    kinds = config.get("layer_types") or [
        "full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(layers)
    ]
    norm = Norm(config.get("rms_norm_eps", 1e-6), unit_offset=True)
    head_dim = config.get("head_dim") or 256
    bias = bool(config.get("attention_bias", False))
    return base_spec(
        {"intermediate_size": config.get("moe_intermediate_size"), **config},
        names=Names(recurrent="linear_attn"),
        norm=norm,
        head_dim=head_dim,
        rope=rotary_of(config, head_dim, fraction=0.25),
        qk_norm=QKNorm(norm=norm),
        qkv_bias=bias,
        output_bias=bias,
        attention_gate=True,
        recurrent=DeltaNetSpec(
            key_heads=need(config, "linear_num_key_heads"),
            value_heads=need(config, "linear_num_value_heads"),
            key_dim=need(config, "linear_key_head_dim"),
            value_dim=need(config, "linear_value_head_dim"),
            taps=config.get("linear_conv_kernel_dim", 4),
        ),
        recurrent_layers=frozenset(i for i, kind in enumerate(kinds) if kind == "linear_attention"),
        extra_tensors=("mtp.",),  # to predict further tokens
    )


def qwen3_5_moe(config: Config) -> DecoderSpec:
    """Qwen2's experts."""
    return dataclasses.replace(qwen3_5(config), experts=experts_of(config, renormalize=True))


def qwen3_next(config: Config) -> DecoderSpec:
    """One tensor for queries, keys, values and gates of the DeltaNet, key head by key head."""
    base = qwen3_5_moe(config)
    assert isinstance(base.recurrent, DeltaNetSpec)
    return dataclasses.replace(base, recurrent=dataclasses.replace(base.recurrent, grouped=True))
