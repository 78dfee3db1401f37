"""The decoder that all families share.

Shapes: T tokens of the step, S rows that draw a token.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from quire_kernels.activation import Activation
from quire_kernels.backends import AttentionBatch, Backend, unquantized
from quire_kernels.cache_write import Rope
from quire_kernels.quantize import Quantized, QuantizedOutput
from torch import Tensor

from quire_engine.layers.attention import Attention
from quire_engine.layers.caches import LayerCache
from quire_engine.layers.delta_net import DeltaNet
from quire_engine.layers.embedding import Embedding, OutputHead
from quire_engine.layers.experts import MixtureOfExperts
from quire_engine.layers.feed_forward import FeedForward
from quire_engine.layers.latent_attention import LatentAttention
from quire_engine.layers.linear import Builder
from quire_engine.layers.mamba import Mamba
from quire_engine.layers.norm import Normalization
from quire_engine.layers.pooler import Pooler
from quire_engine.layers.rotary import RotaryTable
from quire_engine.layers.short_conv import ShortConv
from quire_engine.parallel import ParallelGroup
from quire_engine.spec import DecoderSpec, DeltaNetSpec, Rotary, ShortConvSpec, joined
from quire_engine.weights.tensors import Weights

Mixer = Attention | LatentAttention | ShortConv | DeltaNet | Mamba
_LOADERS = 8  # layers that are read at once


@dataclass(frozen=True, kw_only=True, slots=True)
class Embedded:
    """Tokens of a step that are embeddings of images: E of them."""

    places: Tensor  # [E] int64, among the step's tokens
    rows: Tensor  # [E, hidden]
    deep: Sequence[Tensor] = ()  # [E, hidden] each, added to what the first layers give (Qwen3-VL's deepstack)


class Model(Protocol):
    """What a step runs."""

    spec: DecoderSpec
    layers: Sequence[int]  # of this stage
    progress: Callable[[], None]  # called after each layer

    def __call__(
        self, token_ids: Tensor, batch: AttentionBatch, caches: list[LayerCache], embedded: Embedded | None = None
    ) -> Tensor | None: ...

    def logits(self, hidden: Tensor, out: Tensor | None) -> Tensor | None: ...


class Layer:
    """Attention and feed-forward, each added to the residual by the norm that follows it."""

    def __init__(self, build: Builder, spec: DecoderSpec, layer: int, quantized_cache: bool) -> None:
        names = spec.names
        at = f"{names.layers}.{layer}"
        self._ops = build.ops
        self._scale = spec.residual_scale
        self._parallel = spec.parallel
        self._norm_last = spec.norm_last

        def norm(name: str) -> Normalization | None:
            return Normalization(build, f"{at}.{name}", spec) if name else None

        self._attention_norm = self._after_attention = self._mlp_norm = self._after_mlp = None
        self._mixer: Mixer | None = None
        if layer not in spec.without_mixer:
            self._attention_norm, self._after_attention = norm(names.attention_norm), norm(names.after_attention)
            self._mixer = _mixer(build, spec, layer, quantized_cache)
        if layer not in spec.without_mlp:
            self._mlp_norm, self._after_mlp = norm(names.mlp_norm), norm(names.after_mlp)
        self._mlp: FeedForward | MixtureOfExperts | None = None
        if spec.experts is not None and spec.has_experts(layer):
            self._mlp = MixtureOfExperts(build, spec, spec.experts, at)
        elif layer not in spec.without_mlp:
            projections = (names.gate, names.up, names.down)
            self._mlp = FeedForward(build, spec, joined(at, names.mlp), spec.intermediate_size, projections)

    def __call__(
        self, residual: Tensor, delta: Tensor | None, batch: AttentionBatch, cache: LayerCache, rope: Rope | None
    ) -> tuple[Tensor, Tensor | None]:
        """Adds `delta` [T, hidden] to `residual` in place, and the attention to both. → the residual, and what is to be
        added to it."""
        mixer, mlp = self._mixer, self._mlp
        if self._norm_last:
            return self._with_norms_last(residual, batch, cache, rope), None
        if mixer is None:
            assert mlp is not None
            return residual, self._finished(mlp(_normed(self._ops, self._mlp_norm, residual, delta, mlp.input)), None)
        x = _normed(self._ops, self._attention_norm, residual, delta, mixer.input)
        mixed = self._finished(mixer(x, batch, cache, rope), self._after_attention)
        if mlp is None:
            return residual, mixed
        if self._parallel:
            if self._mlp_norm is not None or mlp.input != mixer.input:
                x = _normed(self._ops, self._mlp_norm or self._attention_norm, residual, None, mlp.input)
            return residual, mixed.add_(self._finished(mlp(x), self._after_mlp))
        x = _normed(self._ops, self._mlp_norm, residual, mixed, mlp.input)
        return residual, self._finished(mlp(x), self._after_mlp)

    def _with_norms_last(self, x: Tensor, batch: AttentionBatch, cache: LayerCache, rope: Rope | None) -> Tensor:
        mixer, mlp = self._mixer, self._mlp
        assert mixer is not None
        assert mlp is not None
        assert self._attention_norm is not None
        assert self._mlp_norm is not None
        mixed = mixer(_normed(self._ops, None, x, None, mixer.input), batch, cache, rope)
        x = unquantized(self._attention_norm(x, mixed))
        return unquantized(self._mlp_norm(x, mlp(_normed(self._ops, None, x, None, mlp.input))))

    def _finished(self, x: Tensor, norm: Normalization | None) -> Tensor:
        if norm is not None:
            x = unquantized(norm(x))
        return x if self._scale == 1.0 else x.mul_(self._scale)


def _mixer(build: Builder, spec: DecoderSpec, layer: int, quantized_cache: bool) -> Mixer:
    """What mixes the tokens of a request in this layer."""
    names, recurrent = spec.names, spec.recurrent
    if recurrent is None or layer not in spec.recurrent_layers:
        at = f"{names.layers}.{layer}.{names.attention}"
        if spec.latent is not None:
            return LatentAttention(build, spec, spec.latent, at)
        return Attention(build, spec, layer, at, quantized_cache)
    at = f"{names.layers}.{layer}.{names.recurrent}"
    if isinstance(recurrent, ShortConvSpec):
        return ShortConv(build, spec, recurrent, at)
    if isinstance(recurrent, DeltaNetSpec):
        return DeltaNet(build, spec, recurrent, at)
    return Mamba(build, spec, recurrent, at)


def _normed(
    ops: Backend, norm: Normalization | None, residual: Tensor, delta: Tensor | None, wanted: QuantizedOutput | None
) -> Tensor | Quantized:
    if norm is not None:
        return norm(residual, delta, wanted)
    if delta is not None:
        residual += delta
    return residual if wanted is None else ops.activate(residual, Activation.IDENTITY, False, wanted)


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
        build = replace(build, transposed=spec.transposed)
        spec = _without_prefix(spec, build.weights)
        group, weights, names = build.group, build.weights, spec.names
        spec.check_parallel(group.size, group.stages, experts_apart=group.experts_apart)
        self.spec = spec
        self.group = group
        self._ops = build.ops
        tied = spec.tie_embeddings
        embedding = None
        if group.first or (group.last and tied and spec.pooling is None):
            embedding = Embedding(build, names.embedding, spec.vocab_size, spec.hidden_size)
        self.embedding = embedding if group.first else None
        self.taps: tuple[int, ...] = ()  # layers, in order, whose inputs `tapped` has after a step; the last's output
        self.tapped: Tensor | None = None  # has the number behind it. [T, taps * hidden]; None: not all of this stage
        self._positions: Tensor | None = None
        self._embedding_norm: Normalization | None = None
        if group.first and names.positions:
            shape = (spec.max_position + spec.position_offset, spec.hidden_size)
            self._positions = weights.take(f"{names.positions}.weight", shape)[spec.position_offset :]
        self._segments: Tensor | None = None
        if group.first and names.segments:
            self._segments = weights.take(f"{names.segments}.weight", (spec.num_segments, spec.hidden_size))
        if group.first and names.embedding_norm:
            self._embedding_norm = Normalization(build, names.embedding_norm, spec)
        self.progress: Callable[[], None] = lambda: None  # called after each layer
        layers = layers_of(spec, group) if layers is None else layers
        self.layers = layers

        def layer(number: int) -> Layer:
            return Layer(build, spec, number, quantized_cache)

        if weights.device.type == "cuda":  # copies overlap
            with ThreadPoolExecutor(_LOADERS) as loaders:
                self._layers = list(loaders.map(layer, layers))
        else:  # OpenMP has a pool of threads for each thread that calls it; loading must not make another
            self._layers = [layer(number) for number in layers]
        self._head: OutputHead | None = None
        self._pooler: Pooler | None = None
        self._norm: Normalization | None = None
        if group.last:
            if names.norm:
                self._norm = Normalization(build, names.norm, spec)
            if spec.pooling is not None:
                self._pooler = Pooler(build, spec, spec.pooling)
            else:
                head = embedding if tied else Embedding(build, names.head, spec.vocab_size, spec.hidden_size)
                assert head is not None
                bias = head.rows_of(f"{names.head}.bias", weights) if spec.head_bias else None
                self._head = OutputHead(build, head.table, bias, spec.vocab_size)
        tables: dict[Rotary | None, RotaryTable | None] = {None: None}
        for rotary in map(spec.rope_of, layers):
            if rotary is not None and rotary not in tables:
                tables[rotary] = RotaryTable(rotary, max_model_len, weights.device)
        self._tables = [tables[spec.rope_of(number)] for number in layers]
        self._device = weights.device
        extra = tuple(f"{names.layers}.{spec.num_layers + i}." for i in range(spec.extra_layers)) + spec.extra_tensors
        mine = tuple(f"{names.layers}.{i}." for i in layers)

        def of_others(name: str) -> bool:
            if name.endswith(("rotary_emb.inv_freq", ".k_scale", ".v_scale", *spec.ignored)):
                return True
            if name.startswith(extra):
                return True
            if names.head and name.startswith(f"{names.head}.") and spec.pooling is not None:
                return True
            if tied and name.startswith(f"{names.head}.") and name != f"{names.head}.bias":  # which is tied to nothing
                return True
            if group.experts_apart and ".experts." in name:
                return True
            return group.stages > 1 and not name.startswith(mine)

        weights.check_all_read(of_others)

    def __call__(
        self, token_ids: Tensor, batch: AttentionBatch, caches: list[LayerCache], embedded: Embedded | None = None
    ) -> Tensor | None:
        """Token ids [T] → the last layer's normalized output [T, hidden]; None on all stages but the last. `embedded`:
        of images, in place of their tokens."""
        residual = (
            self._embedded(token_ids, batch, embedded)
            if self.embedding is not None
            else self.group.receive(token_ids.shape[0], self.spec.hidden_size, self._device)
        )
        if self.spec.bidirectional:
            batch = replace(batch, spans=_whole_texts(batch))
        turned = {table: (None, batch) if table is None else table.of(batch) for table in dict.fromkeys(self._tables)}
        delta: Tensor | None = None
        self.tapped, tapped = None, list[Tensor]()
        for number, layer, cache, table in zip(self.layers, self._layers, caches, self._tables, strict=True):
            if number in self.taps:
                tapped.append(residual.clone() if delta is None else residual + delta)
            rope, turning = turned[table]
            residual, delta = layer(residual, delta, turning, cache, rope)
            if embedded is not None and number < len(embedded.deep):
                residual.index_add_(0, embedded.places, embedded.deep[number])
            self.progress()
        if not self.group.last:
            self.group.send(residual if delta is None else residual.add_(delta))
            return None
        if self.spec.num_layers in self.taps:
            tapped.append(residual.clone() if delta is None else residual + delta)
        self.tapped = torch.cat(tapped, 1) if tapped and len(tapped) == len(self.taps) else None
        return unquantized(_normed(self._ops, self._norm, residual, delta, None))

    def _embedded(self, token_ids: Tensor, batch: AttentionBatch, embedded: Embedded | None) -> Tensor:
        assert self.embedding is not None
        x = self.embedding(token_ids)
        if self.spec.embedding_scale != 1.0:
            x *= self.spec.embedding_scale
        if embedded is not None:
            x.index_copy_(0, embedded.places, embedded.rows)
        if self._positions is not None:
            x += self._positions.index_select(0, batch.positions)
        if self._segments is not None:
            pooling = self.spec.pooling
            if pooling is None or pooling.separator is None:
                x += self._segments[0]
            else:
                x += self._segments.index_select(0, _second_texts(token_ids, pooling.separator, batch.query_starts))
        return x if self._embedding_norm is None else unquantized(self._embedding_norm(x))

    def pooled(self, states: Tensor) -> Tensor:
        """Pooled states [S, hidden] → vectors or scores, fp32."""
        assert self._pooler is not None, "the model generates"
        return self._pooler(states)

    def logits(self, hidden: Tensor, out: Tensor | None) -> Tensor | None:
        """[S, hidden] → fp32 [S, vocabulary] on the last stage's rank 0, in `out` where that is given."""
        logits = self._head(hidden, out) if self._head is not None else None
        if logits is None:
            return None
        if self.spec.logits_scale != 1.0:
            logits *= self.spec.logits_scale
        cap = self.spec.logits_soft_cap
        return logits.div_(cap).tanh_().mul_(cap) if cap else logits


def _without_prefix(spec: DecoderSpec, weights: Weights) -> DecoderSpec:
    """A checkpoint of a model without a head leaves out the name of the model within it."""
    names = spec.names
    if f"{names.embedding}.weight" in weights or f"{names.embedding.partition('.')[2]}.weight" not in weights:
        return spec
    inside = ("embedding", "positions", "segments", "embedding_norm", "layers", "norm")
    return replace(spec, names=replace(names, **{name: getattr(names, name).partition(".")[2] for name in inside}))


def _second_texts(token_ids: Tensor, separator: int, query_starts: Tensor) -> Tensor:
    """[T]: 1 for tokens after their text's first separator, else 0. Each text is in one step."""
    found = (token_ids == separator).to(torch.int32)
    before = found.cumsum(0) - found
    begins = before.index_select(0, query_starts[:-1])
    begins = torch.repeat_interleave(begins, query_starts.diff(), output_size=token_ids.shape[0])
    return (before > begins).to(torch.int32)


def _whole_texts(batch: AttentionBatch) -> Tensor:
    """[T, 2]: the first and the last position of each token's text."""
    tokens = batch.positions.shape[-1]
    ends = torch.repeat_interleave(batch.context_lens, batch.query_starts.diff(), output_size=tokens)
    return torch.stack((torch.zeros_like(ends), ends), 1)


def layers_of(spec: DecoderSpec, group: ParallelGroup) -> range:
    """The layers of a rank's stage; where they do not divide, the first stages have one more."""
    share, more = divmod(spec.num_layers, group.stages)
    start = group.stage * share + min(group.stage, more)
    return range(start, start + share + (group.stage < more))
