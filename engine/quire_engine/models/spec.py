"""What the decoder needs to know of a family: facts only."""

import math
from dataclasses import dataclass
from typing import Any

from quire_engine.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """A pre-norm decoder with grouped-query attention and a gated feed-forward layer."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    max_position: int
    tie_embeddings: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm on each query and key head before the rotary embedding
    windows: tuple[int, ...] = ()  # per layer, 0: all that precedes; empty: 0 everywhere

    def window(self, layer: int) -> int:
        """How many tokens a token of this layer sees, itself included; 0: all."""
        return self.windows[layer] if self.windows else 0

    def check_parallel(self, size: int) -> None:
        """Raises ModelError unless every sliced dimension is a multiple of the number of ranks."""
        dimensions = {
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "intermediate_size": self.intermediate_size,
        }
        for name, count in dimensions.items():
            if count % size:
                common = math.gcd(*dimensions.values())
                fitting = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
                raise ModelError(
                    f"{name} is {count} and cannot be split over {size} ranks; tensor_parallel_size can be {fitting}"
                )

    @property
    def num_parameters(self) -> int:
        """Weights of the whole model."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = self.hidden_size * (2 * q + 2 * kv) + self.qkv_bias * (q + 2 * kv)
        attention += self.output_bias * self.hidden_size + self.qk_norm * 2 * self.head_dim
        mlp = 3 * self.hidden_size * self.intermediate_size
        mlp += self.mlp_bias * (2 * self.intermediate_size + self.hidden_size)
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return self.num_layers * (attention + mlp + 2 * self.hidden_size) + self.hidden_size + tables


def need(config: dict[str, Any], key: str) -> Any:
    """A field of the config. Raises ModelError, naming it, where it is missing."""
    if config.get(key) is None:
        raise ModelError(f"config.json lacks {key}")
    return config[key]


def base_spec(config: dict[str, Any], **facts: Any) -> DecoderSpec:
    """What nearly every family's config says the same way; `facts` adds or overrides."""
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelError(f"hidden_act is {activation!r}; served is silu")
    if quantization := config.get("quantization_config"):
        raise ModelError(
            f"quantization_config asks for {quantization.get('quant_method', 'an unnamed scheme')!r}; served are "
            "unquantized checkpoints and GGUF files"
        )
    heads, hidden = need(config, "num_attention_heads"), need(config, "hidden_size")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    values: dict[str, Any] = {
        "vocab_size": need(config, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": need(config, "intermediate_size"),
        "num_layers": need(config, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or hidden // heads,
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "rope_theta": rope.get("rope_theta") or config.get("rope_theta") or 10000.0,
        "rope_scaling": rope if rope.get("rope_type", rope.get("type", "default")) != "default" else None,
        "max_position": need(config, "max_position_embeddings"),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
    }
    return DecoderSpec(**(values | facts))
