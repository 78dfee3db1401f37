"""Fields of a config as facts, where nearly every family says them the same way."""

from collections.abc import Mapping
from typing import Any

from quire_kernels.activation import Activation
from quire_kernels.norm import Norm

from quire_engine.errors import ModelError
from quire_engine.spec import Config, DecoderSpec, Rotary

ACTIVATIONS = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu": Activation.GELU,
    "gelu_new": Activation.GELU_TANH,
    "gelu_fast": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "relu": Activation.RELU,
    "relu2": Activation.RELU_SQUARED,
}
_ROPE_KINDS = ("default", "linear", "llama3", "yarn", "longrope")


def need(config: Config, *keys: str) -> Any:
    """The first of these fields that the config has. Raises ModelError, naming them, where there is none."""
    for key in keys:
        if config.get(key) is not None:
            return config[key]
    raise ModelError(f"config.json lacks {' or '.join(keys)}")


def activation_of(config: Config, default: str = "silu") -> Activation:
    """Raises ModelError for an activation that no kernel has."""
    for key in ("hidden_activation", "hidden_act", "activation_function", "activation"):
        if (name := config.get(key)) is not None:
            if name not in ACTIVATIONS:
                raise ModelError(f"{key} is {name!r}; served are {', '.join(ACTIVATIONS)}")
            return ACTIVATIONS[name]
    return ACTIVATIONS[default]


def layer_windows(config: Config, layers: int, default: str = "full_attention") -> tuple[int, ...]:
    """From `layer_types`, or one window for all layers (`default` "sliding_attention"). Raises ModelError for layers
    that are neither."""
    window = config.get("sliding_window") or 0
    kinds = config.get("layer_types") or [default] * layers
    if strange := set(kinds) - {"full_attention", "sliding_attention"}:
        raise ModelError(
            f"layer_types has {', '.join(sorted(strange))}; served are full_attention and sliding_attention"
        )
    windows = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    return windows if any(windows) else ()


def base_spec(config: Config, **facts: Any) -> DecoderSpec:
    """What nearly every family's config says the same way; `facts` adds or overrides."""
    heads, hidden = need(config, "num_attention_heads"), need(config, "hidden_size")
    head_dim = facts.get("head_dim") or config.get("head_dim") or hidden // heads
    values: dict[str, Any] = {
        "vocab_size": need(config, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": facts.get("intermediate_size") or need(config, "intermediate_size"),
        "num_layers": need(config, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "norm": Norm(config.get("rms_norm_eps", 1e-6)),
        "max_position": need(config, "max_position_embeddings"),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
    }
    if "rope" not in facts:
        values["rope"] = rotary_of(config, head_dim)
    if "activation" not in facts:
        values["activation"] = activation_of(config)
    return DecoderSpec(**(values | facts))


def rotary_of(
    config: Mapping[str, Any],
    head_dim: int,
    *,
    layer_type: str = "full_attention",
    interleaved: bool = False,
    fraction: float | None = None,
    dim: int | None = None,
    theta: float = 10000.0,
) -> Rotary:
    """From `rope_parameters` (of the layer type, where they are apart), or the older `rope_theta` and `rope_scaling`.

    `fraction` of a head that turns, `dim`, `theta`: where the config says nothing. Raises ModelError for an unknown
    rope type.
    """
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    given = given.get(layer_type, given)
    part = given.get("partial_rotary_factor") or config.get("partial_rotary_factor") or fraction or 1.0
    rotary = Rotary(
        theta=float(given.get("rope_theta") or config.get("rope_theta") or theta),
        dim=dim or int(head_dim * part),
        interleaved=interleaved,
        max_position=config.get("max_position_embeddings") or 0,
        scaling=given,
    )
    if rotary.kind not in _ROPE_KINDS:
        raise ModelError(f"rope_scaling has rope_type {rotary.kind!r}; known are {', '.join(_ROPE_KINDS)}")
    if rotary.kind == "longrope" and not given.get("original_max_position_embeddings"):
        original = config.get("original_max_position_embeddings")
        if original is None:
            raise ModelError("config.json lacks original_max_position_embeddings, which longrope needs")
        return Rotary(**(vars(rotary) | {"scaling": {**given, "original_max_position_embeddings": original}}))
    return rotary
