"""What the decoder needs to know of a family: facts only."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from quire_kernels.activation import Activation
from quire_kernels.norm import Norm

from quire_engine.errors import InvalidParameter, ModelError
from quire_engine.pooling import Pooling

Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Names:
    """How a checkpoint calls its tensors. "" where the family has none; those of a layer follow `layers`.N."""

    embedding: str = "model.embed_tokens"
    positions: str = ""  # learned position embeddings
    segments: str = ""  # embeddings of which text of a pair a token is in
    embedding_norm: str = ""
    layers: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head"
    attention: str = "self_attn"
    q: str = "q_proj"  # the same for q, k and v where one tensor holds all three (`DecoderSpec.qkv`)
    k: str = "k_proj"
    v: str = "v_proj"
    output: str = "o_proj"
    recurrent: str = ""  # in place of attention, in layers that keep states
    q_norm: str = "q_norm"
    k_norm: str = "k_norm"
    mlp: str = "mlp"
    gate: str = "gate_proj"  # the same as `up` where one tensor holds both, the gate first
    up: str = "up_proj"
    down: str = "down_proj"
    attention_norm: str = "input_layernorm"
    after_attention: str = ""  # a norm of the attention's result
    mlp_norm: str = "post_attention_layernorm"
    after_mlp: str = ""
    classifier: tuple[str, ...] = ("score",)  # layers of a classifier, a tanh between them


@dataclass(frozen=True, kw_only=True)
class ExpertsSpec:
    """Layers whose feed-forward part is a mixture of experts."""

    num_experts: int
    top_k: int
    intermediate_size: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = True  # the chosen experts' weights add up to 1
    scale: float = 1.0
    groups: int = 1  # experts are in groups, of which the best `top_groups` take part
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "top2"
    shared_size: int = 0  # an expert that every token goes through, of that inner size
    dense_layers: frozenset[int] = frozenset()  # layers without experts
    at: str = "mlp"  # names in the checkpoint: the block, and in it the router, the experts and their projections
    router: str = "gate"
    router_bias: bool = False
    correction_bias: str = ""  # added to the scores for the choice alone
    experts: str = "experts"
    gate: str = "gate_proj"  # of one expert; or, where one tensor holds all experts, `stacked`: [E, 2I, H]
    up: str = "up_proj"
    down: str = "down_proj"
    stacked: bool = False
    transposed: bool = False  # stacked ones are [E, H, 2I] and [E, I, H]
    interleaved: bool = False  # in stacked ones a gate's output and an up's take turns
    bias: bool = False  # of stacked ones
    shared: str = "shared_experts"
    shared_gate: str = ""  # a sigmoid of this projection weighs the shared expert
    shared_beside: bool = False  # the shared expert's weights lie beside the block, not in it

    def check(self) -> None:
        """Raises ModelError unless there are experts to choose from."""
        taking_part = self.num_experts // self.groups * self.top_groups
        if not 1 <= self.top_k <= taking_part:
            raise ModelError(
                f"config.json has {self.top_k} experts a token and {taking_part} to choose them from; there must be "
                "one at least, and no more than there are"
            )


@dataclass(frozen=True, kw_only=True)
class LatentSpec:
    """Multi-head latent attention (DeepSeek-V2): the cache holds a latent and one rotated key that all heads share."""

    rank: int  # of keys and values
    query_rank: int  # 0: queries are projected at once
    plain: int  # dimensions of a head that do not rotate
    rotated: int
    value: int  # dimensions of a head's value


@dataclass(frozen=True, kw_only=True)
class ShortConvSpec:
    """A gated convolution over the last `taps` tokens (LFM2)."""

    taps: int
    bias: bool


@dataclass(frozen=True, kw_only=True)
class DeltaNetSpec:
    """Gated DeltaNet: attention whose memory is a matrix per value head, which the delta rule corrects."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int
    grouped: bool = False  # one tensor holds queries, keys, values and gates, key head by key head


@dataclass(frozen=True, kw_only=True)
class MambaSpec:
    """Mamba-2: a state-space model whose state is a matrix per head."""

    heads: int
    head_dim: int
    groups: int  # of heads that share what goes into the state and out of it
    state: int
    taps: int
    conv_bias: bool = True
    bias: bool = False  # of both projections
    limits: tuple[float, float] = (0.0, float("inf"))  # of a time step


RecurrentSpec = ShortConvSpec | DeltaNetSpec | MambaSpec


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """How positions turn the first `dim` dimensions of a head."""

    theta: float
    dim: int
    interleaved: bool = False  # pairs are neighbours (GPT-J), not one half's with the other's (GPT-NeoX)
    max_position: int = 0  # of the model
    scaling: Mapping[str, Any] = field(default_factory=dict, hash=False)
    sections: tuple[int, ...] = ()  # frequencies that read a position in time, in rows, in columns (M-RoPE, Qwen2-VL)
    sections_interleaved: bool = False  # the three take turns; else one section follows another

    @property
    def kind(self) -> str:
        """The scaling's."""
        name: str = self.scaling.get("rope_type", self.scaling.get("type", "default"))
        return name


@dataclass(frozen=True, kw_only=True)
class QKNorm:
    """A norm of queries and keys before their rotary embedding (or after it)."""

    norm: Norm
    over: Literal["head", "each_head", "width"] = "head"  # each_head: with weights of its own; width: of all heads
    after_rope: bool = False
    lists: bool = False  # each_head's weights are tensors of their own


@dataclass(frozen=True, kw_only=True)
class MtpSpec:
    """A layer that the checkpoint has besides the model's. It guesses the token after the next one, from the model's
    last hidden state and the next token's embedding (multi-token prediction: DeepSeek-V3, arXiv 2412.19437)."""

    layers: str  # its name is `layers`.`layer`
    layer: int
    at: str  # what the names of the tensors around it begin with, which follow
    embedding_norm: str
    hidden_norm: str
    projection: str  # of embedding and hidden state to the layer's input
    norm: str  # of what the output head and the next guess read
    embedding: str = ""  # the model's own tables, where they may be stored once more
    head: str = ""
    hidden_first: bool = False  # in the projection's input


@dataclass(frozen=True, kw_only=True)
class ImagesSpec:
    """Of a model that takes images."""

    config: Config  # the whole checkpoint's, of which the vision tower is made
    token: int  # in whose places the embeddings of images stand
    bidirectional: bool = False  # tokens of an image that follow one another see all of them,
    at_once: int = 1  # and are computed together: so many
    deepstack: int = 0  # layers to whose results embeddings are added


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """A decoder with grouped-query attention and feed-forward layers or experts."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    tie_embeddings: bool
    names: Names = field(default_factory=Names)
    norm: Norm = field(default_factory=lambda: Norm(1e-6))
    norm_bias: bool = False
    norm_weight: bool = True
    parallel: bool = False  # attention and feed-forward read the same residual; with no `mlp_norm` the same norm
    rope: Rotary | None = None
    local_rope: Rotary | None = None  # of layers with a window, where theirs is another
    without_rope: frozenset[int] = frozenset()  # layers that do not rotate
    windows: tuple[int, ...] = ()  # per layer, 0: all that precedes; empty: 0 everywhere
    qkv: Literal["apart", "stacked", "grouped"] = "apart"  # grouped: one key-value head after another, queries first
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    classifier_bias: bool = False
    transposed: bool = False  # weights are stored [inputs, outputs]
    clip_qkv: float | None = None
    qk_norm: QKNorm | None = None
    attention_scale: float | None = None  # default: head_dim ** -0.5
    query_growth: tuple[float, int] | None = None  # (b, n): queries are times 1 + b log(1 + their position // n)
    soft_cap: float = 0.0
    sinks: bool = False
    alibi: float = 0.0  # the factor of ALiBi's slopes; 0: none
    activation: Activation = Activation.SILU
    position_offset: int = 0  # of learned positions
    num_segments: int = 0  # texts of a pair that are told apart
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what layers add
    logits_scale: float = 1.0
    logits_soft_cap: float = 0.0
    attention_gate: bool = False  # the query's projection holds a gate of the result behind each head
    latent: LatentSpec | None = None
    recurrent: RecurrentSpec | None = None
    recurrent_layers: frozenset[int] = frozenset()
    without_mixer: frozenset[int] = frozenset()  # layers with neither attention nor a state
    without_mlp: frozenset[int] = frozenset()  # layers without a feed-forward part
    experts: ExpertsSpec | None = None
    extra_layers: int = 0  # that the checkpoint has besides, to predict further tokens; none but the first serves
    mtp: MtpSpec | None = None  # that first one; a checkpoint may lack it all the same
    bidirectional: bool = False  # a token sees all of its text
    norm_last: bool = False  # norms are of the sums of residual and result (the original Transformer)
    pooling: Pooling | None = None  # gives vectors or scores, not tokens
    images: ImagesSpec | None = None
    fallback: Config | None = None  # the whole config, where transformers' own code computes the model
    extra_tensors: tuple[str, ...] = ()  # beginnings of names, of tensors that serve what is not served
    ignored: tuple[str, ...] = ()  # ends of tensor names that a checkpoint may hold and nothing needs

    @property
    def context(self) -> int:
        """The longest text that is served, in tokens."""
        trained = self.pooling.max_tokens if self.pooling is not None else None
        return self.max_position if trained is None else min(trained, self.max_position)

    def served_context(self, wanted: int | None) -> int:
        """The context where `--max-model-len` asks for `wanted`. Raises InvalidParameter for more than there is."""
        if wanted is not None and wanted > self.context:
            raise InvalidParameter(f"max_model_len is {wanted}; the model's context is {self.context}", "max_model_len")
        return self.context if wanted is None else wanted

    @property
    def gated(self) -> bool:
        """Whether the feed-forward layers have a gate."""
        return bool(self.names.gate)

    def window(self, layer: int) -> int:
        """How many tokens a token of this layer sees, itself included; 0: all."""
        return self.windows[layer] if self.windows else 0

    def rope_of(self, layer: int) -> Rotary | None:
        """How a layer rotates."""
        if layer in self.without_rope:
            return None
        return self.local_rope if self.local_rope is not None and self.window(layer) else self.rope

    def has_experts(self, layer: int) -> bool:
        """Whether a layer's feed-forward part is a mixture of experts."""
        return self.experts is not None and layer not in self.experts.dense_layers

    def kind_of(self, layer: int) -> tuple[bool, ...]:
        """Layers of one kind hold weights of the same shapes."""
        parts = (self.recurrent_layers, self.without_mixer, self.without_mlp)
        return (*(layer in part for part in parts), self.has_experts(layer))

    def attends(self, layer: int) -> bool:
        """Whether a layer keeps keys and values."""
        return layer not in self.recurrent_layers and layer not in self.without_mixer

    @property
    def attending(self) -> bool:
        """Whether any layer keeps keys and values."""
        return any(self.attends(layer) for layer in range(self.num_layers))

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
        sliced = {}
        if self.attending:
            sliced["num_attention_heads"] = self.num_heads
        if self.experts is None or self.experts.dense_layers:
            sliced["intermediate_size"] = self.intermediate_size
        if self.experts is not None:
            if experts_apart:
                sliced["num_experts"] = self.experts.num_experts
            else:
                sliced["moe_intermediate_size"] = self.experts.intermediate_size
            if self.experts.shared_size:
                sliced["shared_expert_intermediate_size"] = self.experts.shared_size
        if isinstance(self.recurrent, ShortConvSpec):
            sliced["hidden_size"] = self.hidden_size
        elif isinstance(self.recurrent, DeltaNetSpec):
            sliced["linear_num_key_heads"] = self.recurrent.key_heads
        elif self.recurrent is not None:
            sliced["the number of Mamba's heads"] = self.recurrent.heads
            if self.recurrent.groups > 1:
                sliced["the number of Mamba's groups"] = self.recurrent.groups
        for name, count in sliced.items():
            if count % size:
                return f"{name} is {count} and cannot be split"
        if self.fallback is not None and self.num_kv_heads % size:
            return f"num_key_value_heads is {self.num_kv_heads} and cannot be split"
        if self.latent is None and self.num_kv_heads % size and size % self.num_kv_heads:
            return f"num_key_value_heads is {self.num_kv_heads} and can neither be split nor repeated"
        return None


def joined(*parts: str) -> str:
    """A tensor's name from its parts, of which some families lack one."""
    return ".".join(part for part in parts if part)
