"""The decoder that all families share.

Shapes: T tokens of the step, H query heads and K key-value heads of this rank, D head dim, S rows that draw a token.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from quire_kernels.activation import Activation
from quire_kernels.backends import AttentionBatch
from quire_kernels.cache_write import CacheScales, HeadNorm, Rope
from quire_kernels.norm import Norm
from quire_kernels.paged_attention import AttentionOptions
from quire_kernels.quantize import Quantized, QuantizedOutput
from torch import Tensor

from quire_engine.execution.group import ParallelGroup
from quire_engine.layers.embedding import Embedding, OutputHead
from quire_engine.layers.experts import MixtureOfExperts
from quire_engine.layers.linear import Builder, shard
from quire_engine.layers.rotary import cos_sin_table
from quire_engine.models.spec import DecoderSpec
from quire_engine.quantization.schemes import Part

_LOADERS = 8  # layers that are read at once
KVCache = tuple[Tensor, Tensor]  # keys and values of one layer, [pages, K, block size, D] each


class Attention:
    """Grouped-query attention over the paged cache."""

    def __init__(self, build: Builder, spec: DecoderSpec, layer: int, quantized_cache: bool) -> None:
        at = f"model.layers.{layer}.self_attn"
        weights, group = build.weights, build.group
        self._ops = build.ops
        self._head_dim = spec.head_dim
        self._num_heads = spec.num_heads // group.size
        self._scale = spec.head_dim**-0.5
        heads, kv_heads = shard(spec.num_heads, group), kv_heads_of(spec, group)
        self._kv_heads = kv_heads.stop - kv_heads.start
        self._cache_scales = cache_scales(build, at, self._kv_heads) if quantized_cache else None
        stored = self._cache_scales
        self._options = AttentionOptions(
            window=spec.window(layer),
            key_scale=None if stored is None else stored.key,
            value_scale=None if stored is None else stored.value,
        )

        def rows(name: str, whole: int, part: slice) -> Part:
            size = spec.head_dim
            return Part(f"{at}.{name}_proj", whole * size, slice(part.start * size, part.stop * size))

        parts = [rows("q", spec.num_heads, heads)]
        parts += [rows(name, spec.num_kv_heads, kv_heads) for name in ("k", "v")]
        self._qkv = build.column_parallel(parts, spec.hidden_size, spec.qkv_bias)
        inner = spec.num_heads * spec.head_dim
        self._output = build.row_parallel(f"{at}.o_proj", spec.hidden_size, inner, spec.output_bias)
        self._norm: HeadNorm | None = None
        if spec.qk_norm:
            q_weight, k_weight = (weights.take(f"{at}.{name}_norm.weight", (spec.head_dim,)) for name in ("q", "k"))
            self._norm = HeadNorm(q_weight=q_weight, k_weight=k_weight, eps=spec.norm_eps)

    @property
    def input(self) -> QuantizedOutput | None:
        """The form in which the first projection wants its input."""
        return self._qkv.input

    def __call__(self, x: Tensor | Quantized, batch: AttentionBatch, cache: KVCache, rope: Rope) -> Tensor:
        ops = self._ops
        qkv = self._qkv(x)  # [T, (H + 2K) * D]
        ops.rope_cache_write(qkv, *cache, batch, self._num_heads, rope, self._norm, self._cache_scales)
        heads = qkv.view(qkv.shape[0], self._num_heads + 2 * self._kv_heads, self._head_dim)
        attended = ops.paged_attention(heads[:, : self._num_heads], *cache, batch, self._scale, self._options)
        flat = attended.reshape(qkv.shape[0], -1)
        wanted = self._output.input
        return self._output(flat if wanted is None else ops.activate(flat, Activation.IDENTITY, False, wanted))


class FeedForward:
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, build: Builder, spec: DecoderSpec, at: str) -> None:
        self._ops = build.ops
        inner, part = spec.intermediate_size, shard(spec.intermediate_size, build.group)
        parts = [Part(f"{at}.{name}_proj", inner, part) for name in ("gate", "up")]
        self._gate_up = build.column_parallel(parts, spec.hidden_size, spec.mlp_bias)
        self._down = build.row_parallel(f"{at}.down_proj", spec.hidden_size, inner, spec.mlp_bias)

    @property
    def input(self) -> QuantizedOutput | None:
        """The form in which the first projection wants its input."""
        return self._gate_up.input

    def __call__(self, x: Tensor | Quantized) -> Tensor:
        return self._down(self._ops.activate(self._gate_up(x), Activation.SILU, True, self._down.input))


class Layer:
    """Pre-norm attention and feed-forward, each added to the residual by the norm that follows it."""

    def __init__(self, build: Builder, spec: DecoderSpec, layer: int, quantized_cache: bool) -> None:
        at = f"model.layers.{layer}"
        self._ops = build.ops
        self._kind = Norm(spec.norm_eps)
        self._attention_norm = build.weights.take(f"{at}.input_layernorm.weight", (spec.hidden_size,))
        self._attention = Attention(build, spec, layer, quantized_cache)
        self._mlp_norm = build.weights.take(f"{at}.post_attention_layernorm.weight", (spec.hidden_size,))
        self._mlp: Callable[[Any], Tensor]
        if spec.experts is not None and spec.kind_of(layer) == "experts":
            self._mlp = mixture = MixtureOfExperts(build, spec.experts, f"{at}.{spec.experts.at}", spec.hidden_size)
            self._mlp_input: QuantizedOutput | None = mixture.input
        else:
            self._mlp = dense = FeedForward(build, spec, f"{at}.mlp")
            self._mlp_input = dense.input

    def __call__(
        self, residual: Tensor, delta: Tensor | None, batch: AttentionBatch, cache: KVCache, rope: Rope
    ) -> Tensor:
        """Adds `delta` [T, hidden] to `residual` in place, and the attention to both; returns what is to be added."""
        ops, kind = self._ops, self._kind
        x = ops.add_norm(residual, delta, self._attention_norm, kind, self._attention.input)
        attended = self._attention(x, batch, cache, rope)
        return self._mlp(ops.add_norm(residual, attended, self._mlp_norm, kind, self._mlp_input))


class Decoder:
    """Token ids to logits, or this rank's stage of it. Building it reads the weights, each straight into its slice."""

    def __init__(
        self,
        build: Builder,
        spec: DecoderSpec,
        max_model_len: int,
        *,
        quantized_cache: bool = False,
        layers: Sequence[int] | None = None,
    ) -> None:
        """`layers`: those to build (default: all of the rank's stage)."""
        group, weights = build.group, build.weights
        spec.check_parallel(group.size, group.stages, experts_apart=group.experts_apart)
        self.spec = spec
        self.group = group
        self._ops = build.ops
        tied = spec.tie_embeddings
        embedding = None
        if group.first or (group.last and tied):
            embedding = Embedding(build, "model.embed_tokens", spec.vocab_size, spec.hidden_size)
        self._embedding = embedding if group.first else None
        self.progress: Callable[[], None] = lambda: None  # called after each layer
        layers = layers_of(spec, group) if layers is None else layers
        self.num_layers = len(layers)

        def layer(number: int) -> Layer:
            return Layer(build, spec, number, quantized_cache)

        if weights.device.type == "cuda":  # copies overlap
            with ThreadPoolExecutor(_LOADERS) as loaders:
                self._layers = list(loaders.map(layer, layers))
        else:  # OpenMP has a pool of threads for each thread that calls it; loading must not make another
            self._layers = [layer(number) for number in layers]
        self._head: OutputHead | None = None
        if group.last:
            self._norm = weights.take("model.norm.weight", (spec.hidden_size,))
            head = embedding if tied else Embedding(build, "lm_head", spec.vocab_size, spec.hidden_size)
            assert head is not None
            self._head = OutputHead(build, head.table, spec.vocab_size)
        cos_sin = cos_sin_table(
            theta=spec.rope_theta,
            rotary_dim=spec.head_dim,
            scaling=spec.rope_scaling,
            max_position=max_model_len,
            model_max_position=spec.max_position,
        )
        self._rope = Rope(cos_sin=cos_sin.to(weights.device))
        others = tuple(f"model.layers.{i}." for i in range(spec.num_layers) if i not in layers)

        def of_others(name: str) -> bool:
            if name.endswith(("rotary_emb.inv_freq", ".k_scale", ".v_scale")) or (tied and name == "lm_head.weight"):
                return True
            if group.experts_apart and ".experts." in name:
                return True
            return group.stages > 1 and (not name.startswith("model.layers.") or name.startswith(others))

        weights.check_all_read(of_others)

    def __call__(self, token_ids: Tensor, batch: AttentionBatch, caches: list[KVCache]) -> Tensor | None:
        """Token ids [T] → the last layer's normalized output [T, hidden]; None on all stages but the last."""
        residual = (
            self._embedding(token_ids)
            if self._embedding is not None
            else self.group.receive(token_ids.shape[0], self.spec.hidden_size, self._rope.cos_sin.device)
        )
        delta: Tensor | None = None
        for layer, cache in zip(self._layers, caches, strict=True):
            delta = layer(residual, delta, batch, cache, self._rope)
            self.progress()
        if self._head is None:
            self.group.send(residual if delta is None else residual.add_(delta))
            return None
        normalized = self._ops.add_norm(residual, delta, self._norm, Norm(self.spec.norm_eps))
        assert isinstance(normalized, Tensor)
        return normalized

    def logits(self, hidden: Tensor) -> Tensor | None:
        """[S, hidden] → fp32 [S, vocabulary] on the last stage's rank 0."""
        return self._head(hidden) if self._head is not None else None


def layers_of(spec: DecoderSpec, group: ParallelGroup) -> range:
    """The layers of a rank's stage; where they do not divide, the first stages have one more."""
    share, more = divmod(spec.num_layers, group.stages)
    start = group.stage * share + min(group.stage, more)
    return range(start, start + share + (group.stage < more))


def kv_heads_of(spec: DecoderSpec, group: ParallelGroup) -> slice:
    """The key-value heads of a rank; with more ranks than heads several ranks hold the same one."""
    if spec.num_kv_heads >= group.size:
        return shard(spec.num_kv_heads, group)
    head = group.rank * spec.num_kv_heads // group.size
    return slice(head, head + 1)


def cache_scales(build: Builder, at: str, heads: int) -> CacheScales:
    """What an fp8 cache's numbers stand for: as the checkpoint was calibrated, else 1."""

    def scale(name: str) -> Tensor:
        full = f"{at}.{name}_scale"
        one = torch.ones(heads, device=build.weights.device)
        return one * build.weights.take_all(full).flatten() if full in build.weights else one

    return CacheScales(key=scale("k"), value=scale("v"))


def empty_caches(
    spec: DecoderSpec, group: ParallelGroup, num_pages: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> list[KVCache]:
    """This rank's slice of the paged cache: one pair of tensors per layer of its stage.

    A CPU's is not cleared, so that memory is taken only as pages are used: no kernel reads a slot before it is written.
    A GPU's is, for the padding of captured steps reads page 0 and must find numbers there.
    """
    heads = kv_heads_of(spec, group)
    shape = (num_pages, heads.stop - heads.start, block_size, spec.head_dim)
    make = torch.empty if device.type != "cuda" else torch.zeros
    return [
        (make(shape, dtype=dtype, device=device), make(shape, dtype=dtype, device=device))
        for _ in layers_of(spec, group)
    ]
