"""gpt-oss: sinks in attention, a window on every other layer, biases everywhere, clamped SwiGLU experts in MXFP4."""

from quire_kernels.activation import CLAMP, SHARPNESS, Activation

from quire_engine.errors import ModelError
from quire_engine.models.base import base_spec, layer_windows
from quire_engine.spec import Config, DecoderSpec, ExpertsSpec


def spec(config: Config) -> DecoderSpec:
    """Raises ModelError for other clamps."""
    for field, value in (("swiglu_limit", CLAMP), ("swiglu_alpha", SHARPNESS)):
        if config.get(field, value) != value:  # no field of older versions of transformers
            raise ModelError(f"{field} is {config[field]}; served is {value}")
    experts = ExpertsSpec(
        num_experts=config["num_local_experts"],
        top_k=config["num_experts_per_tok"],
        intermediate_size=config["intermediate_size"],
        router="router",
        router_bias=True,
        up="gate_up_proj",
        stacked=True,
        transposed=True,
        interleaved=True,
        bias=True,
    )
    return base_spec(
        config,
        windows=layer_windows(config),
        sinks=True,
        activation=Activation.SWIGLU_CLAMPED,
        qkv_bias=bool(config["attention_bias"]),
        output_bias=bool(config["attention_bias"]),
        experts=experts,
    )
