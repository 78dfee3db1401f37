"""gpt-oss: sinks in attention, a window on every other layer, biases everywhere, clamped SwiGLU experts in MXFP4."""

from quire_kernels.activation import CLAMP, SHARPNESS, Activation

from quire_engine.errors import ModelError
from quire_engine.models.base import base_spec, layer_windows, need
from quire_engine.spec import Config, DecoderSpec, ExpertsSpec


def spec(config: Config) -> DecoderSpec:
    """Even layers have the window where `layer_types` says nothing. Raises ModelError for other clamps."""
    layers = need(config, "num_hidden_layers")
    for field, value in (("swiglu_limit", CLAMP), ("swiglu_alpha", SHARPNESS)):
        if config.get(field, value) != value:
            raise ModelError(f"{field} is {config[field]}; served is {value}")
    kinds = config.get("layer_types") or ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    experts = ExpertsSpec(
        num_experts=need(config, "num_local_experts"),
        top_k=need(config, "num_experts_per_tok", "experts_per_token"),
        intermediate_size=need(config, "intermediate_size"),
        router="router",
        router_bias=True,
        up="gate_up_proj",
        stacked=True,
        transposed=True,
        interleaved=True,
        bias=True,
    )
    return base_spec(
        {"head_dim": 64, "rms_norm_eps": 1e-5, **config},
        windows=layer_windows({"sliding_window": 128, **config, "layer_types": kinds}, layers),
        sinks=True,
        activation=Activation.SWIGLU_CLAMPED,
        qkv_bias=bool(config.get("attention_bias", True)),
        output_bias=bool(config.get("attention_bias", True)),
        experts=experts,
    )
