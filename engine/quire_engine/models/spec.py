"""What the decoder needs to know of a family: facts only."""

from dataclasses import dataclass
from typing import Any, Literal

from quire_engine.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class ExpertsSpec:
    """Layers whose feed-forward part is a mixture of experts."""

    num_experts: int
    top_k: int
    intermediate_size: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = True  # the chosen experts' weights add up to 1
    scale: float = 1.0
    dense_layers: frozenset[int] = frozenset()  # layers without experts
    at: str = "mlp"  # names in the checkpoint: the block, its router, and an expert's gate, up and down projections
    router: str = "gate"
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """A pre-norm decoder with grouped-query attention and gated feed-forward layers or experts."""

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
    experts: "ExpertsSpec | None" = None
    windows: tuple[int, ...] = ()  # per layer, 0: all that precedes; empty: 0 everywhere

    def window(self, layer: int) -> int:
        """How many tokens a token of this layer sees, itself included; 0: all."""
        return self.windows[layer] if self.windows else 0

    def kind_of(self, layer: int) -> str:
        """Layers of one kind hold weights of the same shapes."""
        return "experts" if self.experts is not None and layer not in self.experts.dense_layers else "dense"

    def check_parallel(self, size: int, stages: int = 1, *, experts_apart: bool = False) -> None:
        """Raises ModelError unless every sliced dimension is a multiple of the number of ranks. Key-value heads may
        also be fewer: then several ranks hold the same one."""
        if stages > self.num_layers:
            raise ModelError(
                f"{self.num_layers} layers cannot be split over {stages} stages; lower pipeline_parallel_size"
            )
        fitting = [n for n in range(1, self.num_heads + 1) if not self._misfit(n, experts_apart)]
        if misfit := self._misfit(size, experts_apart):
            raise ModelError(f"{misfit} over {size} ranks; tensor_parallel_size can be {', '.join(map(str, fitting))}")

    def _misfit(self, size: int, experts_apart: bool) -> str | None:
        sliced = {"num_attention_heads": self.num_heads}
        if self.experts is None or self.experts.dense_layers:
            sliced["intermediate_size"] = self.intermediate_size
        if self.experts is not None:
            if experts_apart:
                sliced["num_experts"] = self.experts.num_experts
            else:
                sliced["moe_intermediate_size"] = self.experts.intermediate_size
        for name, count in sliced.items():
            if count % size:
                return f"{name} is {count} and cannot be split"
        if self.num_kv_heads % size and size % self.num_kv_heads:
            return f"num_key_value_heads is {self.num_kv_heads} and can neither be split nor repeated"
        return None


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
