"""Qwen3-Next and Qwen3.5 (text): three layers of gated DeltaNet to one of attention whose result is gated too."""

import dataclasses

from quire_kernels.norm import Norm

from quire_engine.models.base import base_spec, check_convolutions, head_dim_of, rotary_of
from quire_engine.models.qwen2_moe import experts_of
from quire_engine.models.qwen3_moe import dense_layers
from quire_engine.spec import Config, DecoderSpec, DeltaNetSpec, MtpSpec, Names, QKNorm

_MTP = MtpSpec(
    layers="mtp.layers",
    layer=0,
    at="mtp",
    embedding_norm="pre_fc_norm_embedding",
    hidden_norm="pre_fc_norm_hidden",
    projection="fc",
    norm="norm",
)


def qwen3_5(config: Config) -> DecoderSpec:
    """Norms' factors are 1 + weight. Texts have one position per token, so the three axes of its RoPE are one."""
    check_convolutions(config)
    norm = Norm(config["rms_norm_eps"], unit_offset=True)
    bias = bool(config["attention_bias"])
    return base_spec(
        config,
        names=Names(recurrent="linear_attn"),
        norm=norm,
        rope=rotary_of(config, head_dim_of(config), partial=True),
        qk_norm=QKNorm(norm=norm),
        qkv_bias=bias,
        output_bias=bias,
        attention_gate=True,
        recurrent=DeltaNetSpec(
            key_heads=config["linear_num_key_heads"],
            value_heads=config["linear_num_value_heads"],
            key_dim=config["linear_key_head_dim"],
            value_dim=config["linear_value_head_dim"],
            taps=config["linear_conv_kernel_dim"],
        ),
        recurrent_layers=frozenset(i for i, kind in enumerate(config["layer_types"]) if kind == "linear_attention"),
        extra_tensors=("mtp.",),  # to predict further tokens
        mtp=_MTP if config.get("mtp_num_hidden_layers", 1) else None,  # Qwen3-Next's configs do not speak of it
    )


def qwen3_5_moe(config: Config) -> DecoderSpec:
    """Qwen2's experts, in every layer."""
    base = qwen3_5({**config, "intermediate_size": config["moe_intermediate_size"]})
    return dataclasses.replace(base, experts=experts_of(config))


def qwen3_next(config: Config) -> DecoderSpec:
    """One tensor for queries, keys, values and gates of the DeltaNet, key head by key head."""
    base = qwen3_5(config)
    assert isinstance(base.recurrent, DeltaNetSpec)
    experts = experts_of(config, renormalize=bool(config["norm_topk_prob"]), dense_layers=dense_layers(config))
    return dataclasses.replace(base, experts=experts, recurrent=dataclasses.replace(base.recurrent, grouped=True))
