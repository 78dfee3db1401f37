"""A step without numbers: what a model allocates, found by building and running it on the meta device.

Every layer does what it always does; only the kernels are replaced by ones that allocate their results, and what the
device's own backend would allocate beside them.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from quire_kernels.activation import Activation
from quire_kernels.backends import AttentionBatch, Matmul, QuantizedMatmul
from quire_kernels.cache_write import CacheScales, HeadNorm, Rope
from quire_kernels.hardware import Hardware
from quire_kernels.mla import tiling as latent_tiling
from quire_kernels.moe import Experts, Routing
from quire_kernels.norm import Norm
from quire_kernels.paged_attention import AttentionOptions, tiling
from quire_kernels.quantize import Quantized, QuantizedOutput
from quire_kernels.quantized_matmul import Int4Weight
from quire_kernels.recurrence import Gates, StateBatch
from quire_kernels.sampling import Rows
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quire_engine.batch import Batcher, Shape, StepBatch
from quire_engine.config import SchedulerLimits
from quire_engine.layers.caches import empty_caches
from quire_engine.layers.linear import Builder
from quire_engine.memory.shapes import largest_shapes
from quire_engine.models.decoder import Decoder, Layer, Model, layers_of
from quire_engine.models.drafts import DraftSource, Guesser
from quire_engine.models.fallback import TransformersDecoder
from quire_engine.parallel import ParallelGroup
from quire_engine.quantization.config import Quantization
from quire_engine.request import EngineSampling, TokenSet
from quire_engine.sampling.sampler import Sampler
from quire_engine.spec import DecoderSpec
from quire_engine.step import NewRow, Places, StepPlan
from quire_engine.weights.random import RandomWeights

META = torch.device("meta")


class AllocatedBytes(TorchDispatchMode):
    """Counts the bytes that live tensors of the meta device would take, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class DryGroup(ParallelGroup):
    """One rank's place, without the others."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def gather_columns(self, x: Tensor) -> Tensor | None:
        if self.size == 1:
            return x
        return x.new_empty((x.shape[0], x.shape[1] * self.size)) if self.rank == 0 else None

    def share_drawn(self, tokens: Tensor) -> None:
        pass

    def send(self, x: Tensor) -> None:
        pass

    def receive(self, rows: int, columns: int, device: torch.device) -> Tensor:
        return torch.empty((rows, columns), dtype=self._dtype, device=device)


class DryBackend:
    """Results without values, and the memory that the Triton kernels of a chip take beside them; without a chip as the
    CPU's backends hold weights and intermediate results."""

    name = "dry"

    def __init__(self, chip: Hardware | None) -> None:
        self._chip = chip
        self._cpu = chip is None
        self.fp8 = torch.float8_e4m3fn if chip is None else chip.fp8
        self.packed_experts = chip is not None

    def paged_attention(
        self,
        q: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        options: AttentionOptions,
    ) -> Tensor:
        out = q.new_empty(q.shape)
        if self._chip is not None:
            rest = (q, key_cache, batch.block_tables, batch.longest_query, options)
            self._bytes(tiling.parts_bytes(self._chip, *rest))
        return out

    def rope_cache_write(
        self,
        qkv: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: AttentionBatch,
        num_heads: int,
        rope: Rope | None,
        norm: HeadNorm | None,
        scales: CacheScales | None,
    ) -> None:
        pass

    def add_norm(
        self,
        residual: Tensor,
        delta: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        norm: Norm,
        output: QuantizedOutput | None = None,
    ) -> Tensor | Quantized:
        return self._result(residual, residual.shape[1], output)

    def norm_heads(self, x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm) -> None:
        if self._cpu:
            self._scratch(tuple(x.shape), 2)

    def activate(
        self, x: Tensor, kind: Activation, gated: bool, output: QuantizedOutput | None = None
    ) -> Tensor | Quantized:
        return self._result(x, x.shape[1] // 2 if gated else x.shape[1], output)

    def _result(self, x: Tensor, columns: int, output: QuantizedOutput | None) -> Tensor | Quantized:
        plain = x.new_empty((x.shape[0], columns))
        if output is None:
            return plain
        if self._cpu:  # torch quantizes in several operators
            self._scratch((x.shape[0], columns), 2)
        del plain
        return output.empty(x.shape[0], columns, x.device)

    def linear(self, weight: Tensor, bias: Tensor | None) -> Matmul:
        held = torch.empty_like(weight) if self._cpu and weight.dtype == torch.float32 else weight

        def matmul(x: Tensor) -> Tensor:
            return x.new_empty((x.shape[0], held.shape[0]))

        return matmul

    def scaled_linear(self, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> QuantizedMatmul:
        integers = weight.dtype == torch.int8
        as_stored = not self._cpu or integers
        held = (weight, scale) if as_stored else (torch.empty_like(weight, dtype=dtype), bias)

        def matmul(x: Quantized) -> Tensor:
            if self._cpu:  # int8's sums, or the inputs that fp8 stands for
                rows, inputs = x.values.shape
                self._scratch((rows, held[0].shape[0]) if integers else (rows, inputs), 1)
            return torch.empty((x.values.shape[0], held[0].shape[0]), dtype=dtype, device=META)

        return matmul

    def int4_linear(self, weight: Int4Weight, bias: Tensor | None) -> Matmul:
        chunks, outputs, _ = weight.packed.shape
        if self._cpu:
            return self.linear(torch.empty((outputs, chunks * 64), dtype=weight.scales.dtype, device=META), bias)

        def matmul(x: Tensor, held: Int4Weight = weight) -> Tensor:
            return x.new_empty((x.shape[0], held.scales.shape[1]))

        return matmul

    @staticmethod
    def _bytes(count: int) -> None:
        """As many that are gone before the result is returned."""
        torch.empty(count, dtype=torch.uint8, device=META)

    @staticmethod
    def _scratch(shape: tuple[int, ...], count: int) -> None:
        """fp32 tensors that are gone before the result is returned."""
        del [torch.empty(shape, dtype=torch.float32, device=META) for _ in range(count)][:]

    def experts(self, x: Tensor, router_logits: Tensor, routing: Routing, experts: Experts) -> Tensor:
        pairs = x.shape[0] * routing.top_k
        chosen = [torch.empty((pairs,), dtype=torch.float32, device=META) for _ in range(3)]  # weights, experts, rows
        inner = x.new_empty((pairs, experts.inner))
        activated = self.activate(inner, experts.activation, True, experts.inputs)
        del inner
        each = x.new_empty((pairs, x.shape[1]))
        out = x.new_empty(x.shape)
        del chosen, activated, each
        return out

    def latent_attention(self, q: Tensor, cache: Tensor, batch: AttentionBatch, scale: float, latent: int) -> Tensor:
        out = q.new_empty((*q.shape[:2], latent))
        if self._chip is not None:
            self._bytes(latent_tiling.parts_bytes(self._chip, q, cache, batch.block_tables, latent))
        return out

    def latent_cache_write(
        self,
        latent: Tensor,
        q_rope: Tensor,
        cache: Tensor,
        batch: AttentionBatch,
        rope: Rope,
        weight: Tensor,
        eps: float,
    ) -> None:
        pass

    def short_convolution(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, states: Tensor, batch: StateBatch
    ) -> Tensor:
        return x.new_empty(x.shape)

    def recurrence(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dt: Tensor,
        beta: Tensor | None,
        gates: Gates,
        states: Tensor,
        batch: StateBatch,
    ) -> Tensor:
        return v.new_empty(v.shape)

    def mask_logits(self, logits: Tensor, places: Tensor, masks: Tensor) -> None:
        pass

    def draw(self, logits: Tensor, rows: Rows, filtered: bool) -> Tensor:
        scratch = [torch.empty_like(logits) for _ in range(2 if self._cpu else 1)]
        return torch.empty(scratch[0].shape[0], dtype=torch.int32, device=META)


@dataclass(frozen=True, slots=True)
class Allocated:
    """What a dry run found."""

    parameters: int  # numbers in the weights
    weights: int  # bytes
    tables: int  # bytes that are held for all steps, on a GPU: block tables, what penalties remember, graphs' logits
    step: int  # bytes that a step takes beside them, at most
    graphs: int  # the same of the steps that are captured, in memory of their own


def allocated(
    spec: DecoderSpec,
    quantization: Quantization,
    group: DryGroup,
    limits: SchedulerLimits,
    *,
    chip: Hardware | None,
    dtype: torch.dtype,
    captured: Sequence[Shape] = (),
    quantized_cache: bool = False,
    draft: DraftSource | None = None,
) -> Allocated:
    """What one rank of a model, and of what guesses beside it, takes on a chip (None: the CPU), when steps are as large
    as `limits` allow and every row draws.

    On a GPU, where memory that runs out in a step ends all that is served, each row asks for all that costs memory.
    """
    with AllocatedBytes() as counter, torch.inference_mode():
        source = RandomWeights(dtype, META)
        build = Builder(source, group, DryBackend(chip), quantization)
        model, repeated = _one_of_each(build, spec, limits.max_model_len, quantized_cache, counter)
        source.num_parameters += repeated.parameters
        guesser = None
        if draft is not None and group.last:
            own = Builder(RandomWeights(dtype, META, draft.names), group, DryBackend(chip), draft.quantization)
            guesser = draft.build(own, model, limits.max_model_len, quantized_cache)
        built = counter.now
        steps = _Steps(build, model, spec, limits, guesser, everything=chip is not None)
        logits = None
        if captured and group.draws:
            logits = torch.empty((limits.most_draws, spec.vocab_size), dtype=torch.float32, device=META)
        tables = counter.now - built

        def most_of(step: Callable[[], object]) -> int:
            counter.most = counter.now
            step()
            return counter.most - built - tables

        step = 0
        for shape in largest_shapes(limits):
            step = max(step, most_of(partial(steps.run, shape, logits if shape in captured else None)))
        graphs = max((most_of(partial(steps.forward, shape, logits)) for shape in captured), default=0)
    return Allocated(source.num_parameters, built + repeated.bytes, 0 if chip is None else tables, step, graphs)


@dataclass(frozen=True, slots=True)
class _Repeated:
    """Of the layers that were not built, since they are like others."""

    bytes: int
    parameters: int


def _one_of_each(
    build: Builder, spec: DecoderSpec, max_model_len: int, quantized_cache: bool, counter: AllocatedBytes
) -> tuple[Model, _Repeated]:
    """The stage with its first layer and the last of each kind, and what the others add: what a layer gives lives on in
    the next one, so none is seen at its largest as the first."""
    if spec.fallback is not None:
        whole = TransformersDecoder(spec, build.group, build.ops, build.weights.dtype, META, None, max_model_len)
        return whole, _Repeated(0, whole.num_parameters)
    source = build.weights
    assert isinstance(source, RandomWeights)
    layers = layers_of(spec, build.group)
    last_of = {spec.kind_of(layer): layer for layer in layers}
    chosen = sorted({layers[0], *last_of.values()})
    left = Counter(spec.kind_of(layer) for layer in layers) - Counter(spec.kind_of(layer) for layer in chosen)
    size = parameters = 0
    for kind, count in left.items():
        bytes_before, parameters_before = counter.now, source.num_parameters
        layer = Layer(build, spec, last_of[kind], quantized_cache)
        size += count * (counter.now - bytes_before)
        parameters += count * (source.num_parameters - parameters_before)
        source.num_parameters = parameters_before
        del layer
    return (
        Decoder(build, spec, max_model_len, quantized_cache=quantized_cache, layers=chosen),
        _Repeated(size, parameters),
    )


_EVERYTHING = EngineSampling(
    temperature=1.0,
    top_p=0.9,
    repetition_penalty=1.1,
    allowed_token_ids=TokenSet.of((0,)),
    bad_words=((0, 1),),
    logit_bias={0: 1.0},
    logprobs=20,
)


class _Steps:
    """Runs steps as the model runner does."""

    def __init__(
        self,
        build: Builder,
        model: Model,
        spec: DecoderSpec,
        limits: SchedulerLimits,
        guesser: Guesser | None,
        *,
        everything: bool,
    ) -> None:
        """`everything`: each row asks for all that costs memory."""
        ops, group, dtype = build.ops, build.group, build.weights.dtype
        self._model = model
        self._sampler = Sampler(limits.max_num_seqs + 1, spec.vocab_size, META, ops)
        turned_apart = spec.rope is not None and bool(spec.rope.sections)
        self._batcher = Batcher(limits, META, self._sampler, turned_apart=turned_apart)
        self._longest = limits.max_model_len
        params = _EVERYTHING if everything else EngineSampling(temperature=1.0, top_p=0.9)
        if group.draws and spec.pooling is None:
            tokens = np.zeros(2, np.int32)
            self._sampler.set_rows([NewRow(row, params, 1, tokens) for row in range(limits.most_rows)])
        self._limits = limits
        self._guesser, self._dtype = guesser, dtype
        caches = partial(
            empty_caches,
            num_pages=0,
            block_size=limits.block_size,
            num_states=-1,
            dtype=dtype,
            cache_dtype=dtype,
            device=META,
        )
        self._caches = caches(spec, group, model.layers)
        self._guessers = caches(guesser.spec, group, guesser.layers) if guesser is not None else []

    def forward(self, shape: Shape, out: Tensor | None = None) -> tuple[StepBatch, Tensor | None, Tensor | None]:
        """What a head reads and the logits, if any are this rank's."""
        nothing = StepPlan.empty()
        arrays = self._batcher.arrays(nothing, nothing.places(), shape)
        batch = self._batcher.assemble(self._batcher.upload(arrays), shape, self._longest)
        taps = len(self._guesser.taps) if self._guesser is not None else 0
        tapped = torch.empty((shape.tokens, taps * self._model.spec.hidden_size), dtype=self._dtype, device=META)
        hidden = self._model(batch.token_ids, batch.attention, self._caches)
        if hidden is None:
            return batch, None, None
        drawing = hidden if batch.draw_places is None else hidden.index_select(0, batch.draw_places)
        logits = self._model.logits(drawing, None if out is None else out[: shape.draws])
        return batch, tapped if taps else hidden, logits

    def run(self, shape: Shape, out: Tensor | None) -> None:
        """The whole step."""
        batch, hidden, logits = self.forward(shape, out)
        if logits is not None:
            self._sampler.draw(logits, _places(shape, self._limits), batch.draws.parameters)
        if self._guesser is not None and hidden is not None:
            states = self._guesser.combined(hidden) if self._guesser.reads_states else None
            self._guesser(batch.token_ids, states, batch.attention, self._guessers)


def _places(shape: Shape, limits: SchedulerLimits) -> Places:
    """One of each row; the first rows have drafts, as many as there can be."""
    each, requests = limits.drafts_of_one, limits.most_rows
    before = np.arange(requests, dtype=np.int32) * each
    counts = 1 + np.clip(shape.draws - requests - before, 0, each)
    drafts = np.zeros(shape.draws, np.int32)
    drafts[np.cumsum(counts) - counts] = -1
    rows = np.repeat(np.arange(requests, dtype=np.int32), counts)
    return Places(rows, np.ones_like(rows), drafts)
