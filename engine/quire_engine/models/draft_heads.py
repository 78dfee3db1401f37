"""Heads on a model that guess what it will draw, out of its hidden states: one layer, run again on its own result.

A head reads at each place the hidden state there and the embedding of the token after it. T tokens, H hidden size.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from quire_kernels.activation import Activation
from quire_kernels.backends import AttentionBatch, Backend, unquantized
from quire_kernels.cache_write import Rope
from torch import Tensor

from quire_engine.layers.attention import Attention
from quire_engine.layers.caches import LayerCache
from quire_engine.layers.embedding import Embedding, OutputHead
from quire_engine.layers.feed_forward import FeedForward
from quire_engine.layers.linear import Builder
from quire_engine.layers.norm import Normalization
from quire_engine.layers.rotary import RotaryTable
from quire_engine.models.decoder import Decoder, Layer
from quire_engine.models.eagle import EagleSpec, eagle_spec, refused
from quire_engine.quantization.config import Quantization
from quire_engine.quantization.schemes import Linear, Part
from quire_engine.spec import Config, DecoderSpec, MtpSpec
from quire_engine.weights.resolve import ModelFiles
from quire_engine.weights.tensors import WHOLE, Weights

_QUANTIZED = ("weight_scale_inv", "weight_scale", "weight_packed", "qweight")  # tensors of a weight that is quantized
_COMPARED = 4096  # rows at once


class Body(Protocol):
    """A head's layer."""

    def __call__(
        self, embedded: Tensor, states: Tensor, batch: AttentionBatch, cache: LayerCache, rope: Rope | None
    ) -> tuple[Tensor, Tensor | None]:
        """→ a residual [T, H], which belongs to nobody else, and what is to be added to it."""


class DraftHead:
    """A `Guesser` whose states are the model's, and then its own."""

    reads_states = True

    def __init__(
        self,
        spec: DecoderSpec,
        layer: int,
        embedding: Embedding,
        body: Body,
        norm: Normalization | None,
        head: Callable[[Tensor], Tensor | None],
        table: RotaryTable | None,
        *,
        normalized: bool = False,
        fc: Callable[[Tensor], Tensor] | None = None,
        taps: tuple[int, ...] = (),
        vocabulary: Tensor | None = None,
    ) -> None:
        """`norm`: of what `head` reads. `normalized`: the next guess starts behind it. `fc`: of the taps' states."""
        self.spec = spec  # of its layer
        self.layers: Sequence[int] = (layer,)
        self.taps = taps  # layers of the model whose inputs it reads; none: what the model's head reads
        self.vocabulary = vocabulary  # [its vocabulary] the model's id of each of its tokens; None: they are the same
        self.progress: Callable[[], None] = lambda: None  # called after its layer
        self._embedding = embedding
        self._body = body
        self._norm = norm
        self._normalized = normalized
        self._head = head
        self._fc = fc
        self._table = table

    def combined(self, states: Tensor) -> Tensor:
        """What the model gives [T, taps * hidden] → states [T, H] for the first guess."""
        return states if self._fc is None else self._fc(states)

    def __call__(
        self, token_ids: Tensor, states: Tensor | None, batch: AttentionBatch, caches: list[LayerCache]
    ) -> Tensor:
        """For each place the token after the one whose state [T, H] is there → states [T, H] for the next guess."""
        assert states is not None, "a head reads states"
        [cache] = caches
        embedded = self._embedding(token_ids.clamp(max=self._embedding.vocab_size - 1))
        rope, batch = (None, batch) if self._table is None else self._table.of(batch)
        residual, delta = self._body(embedded, states, batch, cache, rope)
        self.progress()
        if self._normalized:
            assert self._norm is not None
            return unquantized(self._norm(residual, delta))
        return residual if delta is None else residual.add_(delta)

    def logits(self, states: Tensor) -> Tensor | None:
        """[S, H] → fp32 [S, its vocabulary] on the stage's rank 0, None elsewhere."""
        if self._norm is not None and not self._normalized:
            states = unquantized(self._norm(states))
        return self._head(states)


class _Joined:
    """An ordinary layer, whose input is a product of embedding and state."""

    def __init__(self, ops: Backend, layer: Layer, projection: Linear, *, hidden_first: bool = False) -> None:
        self._ops = ops
        self._layer = layer
        self._projection = projection
        self._hidden_first = hidden_first
        self.norms: tuple[Normalization, Normalization] | None = None  # of embedding and state

    def __call__(
        self, embedded: Tensor, states: Tensor, batch: AttentionBatch, cache: LayerCache, rope: Rope | None
    ) -> tuple[Tensor, Tensor | None]:
        if self.norms is not None:
            embedded, states = (unquantized(norm(x)) for norm, x in zip(self.norms, (embedded, states), strict=True))
        both = (states, embedded) if self._hidden_first else (embedded, states)
        return self._layer(_product(self._ops, self._projection, torch.cat(both, 1)), None, batch, cache, rope)


class _Beside:
    """EAGLE-3's layer: its attention reads embedding and state beside one another, the residual is the state."""

    def __init__(self, build: Builder, eagle: EagleSpec, at: str, quantized_cache: bool) -> None:
        spec = eagle.layer
        names = spec.names
        self._ops = build.ops
        self._embedding_norm = Normalization(build, f"{at}.{names.attention_norm}", spec)
        self._hidden_norm = Normalization(build, f"{at}.hidden_norm", spec)
        self._mlp_norm = Normalization(build, f"{at}.{names.mlp_norm}", spec)
        self._normed_residual = eagle.normed_residual
        self._attention = Attention(
            build, spec, 0, f"{at}.{names.attention}", quantized_cache, inputs=2 * spec.hidden_size
        )
        projections = (names.gate, names.up, names.down)
        self._mlp = FeedForward(build, spec, f"{at}.{names.mlp}", spec.intermediate_size, projections)

    def __call__(
        self, embedded: Tensor, states: Tensor, batch: AttentionBatch, cache: LayerCache, rope: Rope | None
    ) -> tuple[Tensor, Tensor | None]:
        normed = unquantized(self._hidden_norm(states))
        x = torch.cat((unquantized(self._embedding_norm(embedded)), normed), 1)
        wanted = self._attention.input
        mixed = self._attention(
            x if wanted is None else self._ops.activate(x, Activation.IDENTITY, False, wanted), batch, cache, rope
        )
        residual = mixed.add_(normed if self._normed_residual else states)
        return residual, self._mlp(self._mlp_norm(residual, None, self._mlp.input))


def _product(ops: Backend, linear: Linear, x: Tensor) -> Tensor:
    return linear(x if linear.input is None else ops.activate(x, Activation.IDENTITY, False, linear.input))


def _whole(build: Builder, name: str, outputs: int, inputs: int) -> Linear:
    """A product that every rank computes. Quantized checkpoints often leave its weight as it is and do not say so."""
    if not any(f"{name}.{end}" in build.weights for end in _QUANTIZED):
        build = replace(build, quantization=Quantization())
    return build.column_parallel([Part(name, outputs, WHOLE)], inputs, f"{name}.bias" in build.weights)


def _table(spec: DecoderSpec, layer: int, max_model_len: int, device: torch.device) -> RotaryTable | None:
    rotary = spec.rope_of(layer)
    return None if rotary is None else RotaryTable(rotary, max_model_len, device)


def _own_head(build: Builder, name: str, vocab_size: int, hidden: int) -> Callable[[Tensor], Tensor | None]:
    head = OutputHead(build, Embedding(build, name, vocab_size, hidden).table, None, vocab_size)
    return lambda states: head(states, None)


def _shared_head(model: Decoder) -> Callable[[Tensor], Tensor | None]:
    return lambda states: model.logits(states, None)


# --- multi-token prediction ---


def has_mtp(spec: DecoderSpec, weights: Weights | Collection[str]) -> bool:
    """Whether a checkpoint has the layer that its config speaks of: converters and fine-tunes leave it out.
    `weights`: what has its tensors' names; random ones have none."""
    if spec.mtp is None:
        return False
    name = f"{spec.mtp.at}.{spec.mtp.projection}"
    return any(f"{name}.{end}" in weights for end in ("weight", *_QUANTIZED))


def with_stored_mtp(spec: DecoderSpec, files: ModelFiles) -> DecoderSpec:
    """Without the layer where the checkpoint, if there is one, lacks it."""
    if spec.mtp is None or not files.has_weights or has_mtp(spec, set(files.checkpoint().names())):
        return spec
    return replace(spec, mtp=None)


def mtp_layer_spec(spec: DecoderSpec) -> DecoderSpec:
    """Of the layer alone, for one whose `mtp` is set: what it keeps and how it can be split."""
    mtp = spec.mtp
    assert mtp is not None, "the family has no such layer"
    return replace(
        spec,
        num_layers=mtp.layer + 1,
        names=replace(spec.names, layers=mtp.layers),
        windows=(),
        recurrent=None,
        recurrent_layers=frozenset(),
        mtp=None,
    )


def mtp_head(build: Builder, spec: DecoderSpec, model: Decoder, max_model_len: int, quantized_cache: bool) -> DraftHead:
    """Of the checkpoint that `model`, whose last stage this is, was read from. Raises ModelError where tensors are
    missing, of other shapes or left over."""
    mtp = spec.mtp
    assert mtp is not None, "the family has no such layer"
    build = replace(build, group=build.group.of_stage(), transposed=spec.transposed)
    layer_spec, weights, hidden = mtp_layer_spec(spec), build.weights, spec.hidden_size

    def norm(name: str) -> Normalization:
        return Normalization(build, f"{mtp.at}.{name}", spec)

    projection = _whole(build, f"{mtp.at}.{mtp.projection}", hidden, 2 * hidden)
    layer = Layer(build, layer_spec, mtp.layer, quantized_cache)
    body = _Joined(build.ops, layer, projection, hidden_first=mtp.hidden_first)
    body.norms = norm(mtp.embedding_norm), norm(mtp.hidden_norm)
    made = DraftHead(
        layer_spec,
        mtp.layer,
        _embedding_of_mtp(build, spec, mtp, model),
        body,
        norm(mtp.norm),
        _head_of_mtp(build, spec, mtp, model),
        _table(layer_spec, mtp.layer, max_model_len, weights.device),
        normalized=True,  # as the model's state is that the first guess starts from, and the layer was trained on
    )

    def of_others(name: str) -> bool:
        if not name.startswith(f"{mtp.at}.") or name.endswith(("rotary_emb.inv_freq", ".k_scale", ".v_scale")):
            return True
        return build.group.experts_apart and ".experts." in name

    weights.check_all_read(of_others)
    return made


def _embedding_of_mtp(build: Builder, spec: DecoderSpec, mtp: MtpSpec, model: Decoder) -> Embedding:
    """The model's where this stage has it and the checkpoint no other one."""
    own = mtp.embedding and f"{mtp.at}.{mtp.embedding}"
    if not own or f"{own}.weight" not in build.weights:
        own = ""
    if model.embedding is not None and (not own or model.embedding.equals(own, build.weights)):
        return model.embedding
    return Embedding(build, own or model.spec.names.embedding, spec.vocab_size, spec.hidden_size)


def _head_of_mtp(build: Builder, spec: DecoderSpec, mtp: MtpSpec, model: Decoder) -> Callable[[Tensor], Tensor | None]:
    """The same of the output head. Its table may be laid out anew by now, so the checkpoint is read once more."""
    names = model.spec.names
    own, shared = f"{mtp.at}.{mtp.head}", names.embedding if spec.tie_embeddings else names.head
    if not mtp.head or f"{own}.weight" not in build.weights or _are_copies(build, own, shared, spec):
        return _shared_head(model)
    return _own_head(build, own, spec.vocab_size, spec.hidden_size)


def _are_copies(build: Builder, one: str, other: str, spec: DecoderSpec) -> bool:
    shape = (spec.vocab_size, spec.hidden_size)
    for start in range(0, spec.vocab_size, _COMPARED):
        rows = slice(start, min(start + _COMPARED, spec.vocab_size))
        if not torch.equal(*(build.weights.take(f"{name}.weight", shape, rows) for name in (one, other))):
            return False
    return True


# --- EAGLE ---


def eagle_head(
    build: Builder, config: Config, target: DecoderSpec, model: Decoder, max_model_len: int, quantized_cache: bool
) -> DraftHead:
    """EAGLE (Li et al., arXiv 2401.15077) or EAGLE-3 (arXiv 2503.01840), of a folder of its own: `build.weights` and
    `config`, made whole. `target`: the spec of `model`, whose last stage this is. Raises InvalidParameter where they do
    not belong together, ModelError for tensors that are missing, of other shapes or left over."""
    eagle = eagle_spec(config, target)
    weights = build.weights
    build = replace(build, group=build.group.of_stage())
    at = "midlayer" if eagle.version == 3 and "layers.0.hidden_norm.weight" not in weights else "layers.0"
    spec = replace(
        eagle.layer,
        qkv_bias=f"{at}.self_attn.q_proj.bias" in weights,
        output_bias=f"{at}.self_attn.o_proj.bias" in weights,
        mlp_bias=f"{at}.mlp.up_proj.bias" in weights,
    )
    eagle = replace(eagle, layer=spec)
    spec.check_parallel(build.group.size)
    hidden = spec.hidden_size
    body: Body
    norm: Normalization | None = None
    fc: Callable[[Tensor], Tensor] | None = None
    vocabulary: Tensor | None = None
    if eagle.version == 3:
        body = _Beside(build, eagle, at, quantized_cache)
        norm = Normalization(build, spec.names.norm, spec)
        if eagle.taps:
            combine = _whole(build, "fc", hidden, len(eagle.taps) * target.hidden_size)
            fc = partial(_product, build.ops, combine)
        vocabulary = _vocabulary(weights, eagle, target)
    else:
        body = _Joined(build.ops, Layer(build, spec, 0, quantized_cache), _whole(build, "fc", hidden, 2 * hidden))
    made = DraftHead(
        spec,
        0,
        _embedding_of_eagle(build, spec, model),
        body,
        norm,
        _head_of_eagle(build, eagle, target, model),
        _table(spec, 0, max_model_len, weights.device),
        fc=fc,
        taps=eagle.taps,
        vocabulary=vocabulary,
    )
    unneeded = ("rotary_emb.inv_freq", ".k_scale", ".v_scale")
    weights.check_all_read(lambda name: name == "t2d" or name.endswith(unneeded))  # t2d is d2t the other way round
    return made


def _vocabulary(weights: Weights, eagle: EagleSpec, target: DecoderSpec) -> Tensor | None:
    """Its tokens' ids are stored as how far they are from their places."""
    if "d2t" not in weights or weights.device.type == "meta":
        if eagle.vocab_size > target.vocab_size:
            raise refused(f"the head guesses {eagle.vocab_size} tokens, and the model has {target.vocab_size}")
        return None
    offsets = weights.take_all("d2t").to(torch.int64)
    ids = torch.arange(offsets.numel(), device=offsets.device) + offsets.flatten()
    if ids.shape[0] != eagle.vocab_size or not 0 <= int(ids.min()) <= int(ids.max()) < target.vocab_size:
        raise refused("the head's d2t gives tokens that the model does not have; give a head that was trained on it")
    return ids.to(torch.int32)


def _embedding_of_eagle(build: Builder, spec: DecoderSpec, model: Decoder) -> Embedding:
    """Its own, which is mostly a copy of the model's, or the model's."""
    own, shared = spec.names.embedding, model.embedding
    if f"{own}.weight" in build.weights:
        same = shared is not None and (shared.vocab_size, shared.hidden) == (spec.vocab_size, spec.hidden_size)
        planned = build.weights.device.type == "meta"  # where nobody can say
        if shared is not None and same and not planned and shared.equals(own, build.weights):
            return shared
        return Embedding(build, own, spec.vocab_size, spec.hidden_size)
    if shared is None and "fc.weight" not in build.weights:  # planned by its config alone: they will be there
        return Embedding(build, own, spec.vocab_size, spec.hidden_size)
    if shared is None:
        raise refused(f"the head has no {own}, and the model's are on another stage; set pipeline_parallel_size 1")
    if shared.hidden != spec.hidden_size:
        raise refused(f"the head has no {own}, and the model's are of another width")
    return shared


def _head_of_eagle(
    build: Builder, eagle: EagleSpec, target: DecoderSpec, model: Decoder
) -> Callable[[Tensor], Tensor | None]:
    spec = eagle.layer
    if f"{spec.names.head}.weight" in build.weights or eagle.vocab_size != target.vocab_size:
        return _own_head(build, spec.names.head, eagle.vocab_size, spec.hidden_size)
    if spec.hidden_size != target.hidden_size:
        raise refused(f"the head has no {spec.names.head}, and the model's is of another width")
    return _shared_head(model)
