"""Fields of a config made whole (`weights.hf_config`) as facts, where nearly every family says them the same way."""

import dataclasses
import math
from collections.abc import Callable
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
_ROPE_NUMBERS = {
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
}
_ROPE_NEEDS = {
    "linear": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
_ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def need(config: Config, key: str) -> Any:
    """A field whose default says nothing. Raises ModelError where it is not given."""
    if config[key] is None:
        raise ModelError(f"config.json lacks {key}")
    return config[key]


def activation_of(config: Config, key: str = "hidden_act") -> Activation:
    """Raises ModelError for an activation that no kernel has."""
    if (name := config[key]) not in ACTIVATIONS:
        raise ModelError(f"{key} is {name!r}; served are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def check_convolutions(config: Config, key: str = "hidden_act") -> None:
    """Of layers that keep states, whose convolutions have an activation too. Raises ModelError for all but SiLU."""
    if activation_of(config, key) is not Activation.SILU:
        raise ModelError(f"{key} is {config[key]!r}; models with recurrent layers are served with silu")


def layer_windows(config: Config) -> tuple[int, ...]:
    """From `layer_types`; a family without them has its window in every layer. Raises ModelError for layers that are
    neither."""
    window = config["sliding_window"] or 0
    kinds = config.get("layer_types") or ["sliding_attention"] * config["num_hidden_layers"]
    if strange := set(kinds) - {"full_attention", "sliding_attention"}:
        raise ModelError(
            f"layer_types has {', '.join(sorted(strange))}; served are full_attention and sliding_attention"
        )
    windows = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    return windows if any(windows) else ()


def head_dim_of(config: Config) -> int:
    """A field of its own where a family has one that is set. Raises ModelError for more heads than dimensions."""
    head_dim: int = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if not head_dim:
        raise ModelError("config.json has a hidden_size below num_attention_heads")
    return head_dim


def base_spec(config: Config, **facts: Any) -> DecoderSpec:
    """What nearly every family's config says the same way; `facts` adds or overrides."""
    head_dim = facts.get("head_dim") or head_dim_of(config)
    fields: dict[str, Callable[[], Any]] = {  # read only where the family does not say otherwise
        "vocab_size": lambda: config["vocab_size"],
        "hidden_size": lambda: config["hidden_size"],
        "intermediate_size": lambda: config["intermediate_size"],
        "num_layers": lambda: config["num_hidden_layers"],
        "num_heads": lambda: config["num_attention_heads"],
        "num_kv_heads": lambda: config["num_key_value_heads"],
        "head_dim": lambda: head_dim,
        "norm": lambda: Norm(config["rms_norm_eps"]),
        "max_position": lambda: config["max_position_embeddings"],
        "tie_embeddings": lambda: bool(config["tie_word_embeddings"]),
        "rope": lambda: rotary_of(config, head_dim),
        "activation": lambda: activation_of(config),
    }
    return DecoderSpec(**{name: read() for name, read in fields.items() if name not in facts}, **facts)


def rotary_of(
    config: Config,
    head_dim: int,
    *,
    layer_type: str = "full_attention",
    interleaved: bool = False,
    dim: int | None = None,
    partial: bool = False,
) -> Rotary:
    """From `rope_parameters` (of the layer type, where they are apart). `dim`: where it is no part of the head.
    `partial`: of a family that reads `partial_rotary_factor`; transformers turns whole heads of the others.

    Raises ModelError for an unknown rope type.
    """
    given = config["rope_parameters"]
    given = given.get(layer_type, given)
    rotary = Rotary(
        theta=float(given["rope_theta"]),
        dim=dim or int(head_dim * (given.get("partial_rotary_factor", 1.0) if partial else 1.0)),
        interleaved=interleaved,
        max_position=config["max_position_embeddings"],
        scaling=given,
    )
    if rotary.kind not in _ROPE_KINDS:
        raise ModelError(f"rope_scaling has rope_type {rotary.kind!r}; known are {', '.join(_ROPE_KINDS)}")
    _check(rotary, head_dim)
    return rotary


def with_sections(rotary: Rotary, usual: tuple[int, ...], interleaved: bool) -> Rotary:
    """Of a family whose tokens have positions in time, rows and columns. `usual`: where the config says nothing.
    Raises ModelError for sections that are not three, or that are not of all frequencies."""
    given = rotary.scaling.get("mrope_section", usual)
    if not isinstance(given, list | tuple) or len(given) != 3 or not all(type(n) is int and n >= 0 for n in given):
        raise ModelError(f"rope_parameters of config.json has mrope_section {given!r:.80}; it must be three numbers")
    if not interleaved and sum(given) != rotary.dim // 2:  # those that take turns end where the frequencies do
        raise ModelError(
            f"mrope_section of config.json is {list(given)}; its numbers must add up to {rotary.dim // 2}, one a pair"
        )
    return dataclasses.replace(rotary, sections=tuple(given), sections_interleaved=interleaved)


def _check(rotary: Rotary, head_dim: int) -> None:
    """Raises ModelError for numbers of which no angles can be made."""
    if rotary.dim <= 0 or rotary.dim % 2:
        raise ModelError(
            f"RoPE turns {rotary.dim} dimensions of a head of {head_dim}; it must be an even number of them"
        )
    if lacking := [name for name in _ROPE_NEEDS.get(rotary.kind, ()) if rotary.scaling.get(name) is None]:
        raise ModelError(f"rope_scaling of config.json lacks {', '.join(lacking)}, which {rotary.kind} needs")
    for name in sorted(_ROPE_NUMBERS & rotary.scaling.keys()):
        value = rotary.scaling[name]
        if value is not None and not (_is_number(value) and value > 0):
            raise ModelError(f"rope_scaling of config.json has {name} {value!r}; it must be a number above 0")
    for name in ("short_factor", "long_factor") if rotary.kind == "longrope" else ():
        factors = rotary.scaling[name]
        if len(factors) != rotary.dim // 2 or not all(_is_number(factor) and factor > 0 for factor in factors):
            raise ModelError(
                f"rope_scaling of config.json must have {rotary.dim // 2} numbers above 0 in {name}, one a pair"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
