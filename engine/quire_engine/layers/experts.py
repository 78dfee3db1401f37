"""Mixture of experts over the ranks: each holds a slice of every expert or, with expert parallelism, whole experts."""

from collections.abc import Callable, Sequence

import torch
from quire_kernels.activation import Activation
from quire_kernels.backends import Matmul, unquantized
from quire_kernels.moe import Experts, Routing
from quire_kernels.quantize import Quantized
from quire_kernels.quantized_matmul import Int4Weight
from torch import Tensor

from quire_engine.errors import ModelError
from quire_engine.layers.feed_forward import FeedForward
from quire_engine.layers.linear import Builder, shard
from quire_engine.parallel import ParallelGroup
from quire_engine.quantization.schemes import MXFP4, Int4, Part, Plain
from quire_engine.spec import DecoderSpec, ExpertsSpec, joined
from quire_engine.weights.tensors import WHOLE


class MixtureOfExperts:
    """x [T, hidden] → [T, hidden]: the router's choice of experts, weighted and summed, and what all tokens share."""

    input = None  # the router wants its input as it is

    def __init__(self, build: Builder, decoder: DecoderSpec, spec: ExpertsSpec, layer: str) -> None:
        """`layer`: the name of the layer in the checkpoint."""
        weights, group, ops, hidden = build.weights, build.group, build.ops, decoder.hidden_size
        at = f"{layer}.{spec.at}"
        self._ops = ops
        self._group = group
        router_bias = weights.take(f"{at}.{spec.router}.bias", (spec.num_experts,)) if spec.router_bias else None
        self._router = ops.linear(weights.take(f"{at}.{spec.router}.weight", (spec.num_experts, hidden)), router_bias)
        correction = None
        if spec.correction_bias:
            correction = weights.take_all(f"{at}.{spec.correction_bias}").flatten()
        self._routing = Routing(
            top_k=spec.top_k,
            score=spec.score,
            correction_bias=correction,
            groups=spec.groups,
            top_groups=spec.top_groups,
            group_score=spec.group_score,
            renormalize=spec.renormalize,
            scale=spec.scale,
        )
        self._experts = _experts(build, decoder, spec, joined(at, spec.experts))
        self._shared: FeedForward | None = None
        self._shared_gate: Matmul | None = None
        if spec.shared_size:
            base = layer if spec.shared_beside else at
            names = (spec.gate, spec.up, spec.down)
            if spec.stacked:
                names = (decoder.names.gate, decoder.names.up, decoder.names.down)
            self._shared = FeedForward(build, decoder, f"{base}.{spec.shared}", spec.shared_size, names, summed=False)
            if spec.shared_gate:
                self._shared_gate = ops.linear(weights.take(f"{base}.{spec.shared_gate}.weight", (1, hidden)), None)

    def __call__(self, x: Tensor | Quantized) -> Tensor:
        x = unquantized(x)
        out = self._ops.experts(x, self._router(x), self._routing, self._experts)
        if self._shared is not None:
            wanted = self._shared.input
            shared = self._shared(x if wanted is None else self._ops.activate(x, Activation.IDENTITY, False, wanted))
            if self._shared_gate is not None:
                shared *= unquantized(self._ops.activate(self._shared_gate(x), Activation.SIGMOID, False))
            out += shared
        return self._group.all_reduce(out)


def _experts(build: Builder, decoder: DecoderSpec, spec: ExpertsSpec, at: str) -> Experts:
    weights, group, ops, hidden = build.weights, build.group, build.ops, decoder.hidden_size
    inner = spec.intermediate_size
    if group.experts_apart:
        held = range(spec.num_experts)[shard(spec.num_experts, group)]
        part = WHOLE
    else:
        held = range(spec.num_experts)
        part = shard(inner, group)
    if spec.stacked:
        return _stacked_experts(build, decoder, spec, at, held, part)
    scheme = build.quantization.scheme_of(f"{at}.0.{spec.gate}")
    if isinstance(scheme, Int4) and ops.packed_experts:
        return _int4_experts(build, decoder, spec, at, held, part, scheme)
    piles = {name: _Pile(len(held)) for name in ("gate_up", "down", "gate_up_scale", "down_scale")}
    input_scales: list[Tensor | None] = []
    for place, expert in enumerate(held):
        name = f"{at}.{expert}"
        halves = [
            scheme.read(weights, Part(f"{name}.{half}", inner, part), hidden, WHOLE, ops)
            for half in (spec.gate, spec.up)
        ]
        down = scheme.read(weights, Part(f"{name}.{spec.down}", hidden, WHOLE), inner, part, ops)
        piles["gate_up"].put(place, [half.values for half in halves])
        piles["gate_up_scale"].put(place, [half.scale for half in halves])
        piles["down"].put(place, [down.values])
        piles["down_scale"].put(place, [down.scale])
        input_scales += [stored.input_scale for stored in (*halves, down)]
    gate_up, downs = piles["gate_up"].all, piles["down"].all
    assert gate_up is not None
    assert downs is not None
    return Experts(
        gate_up=gate_up,
        down=downs,
        activation=decoder.activation,
        gate_up_scale=piles["gate_up_scale"].all,
        down_scale=piles["down_scale"].all,
        inputs=scheme.expert_inputs(input_scales, ops),
        first=held.start,
    )


def _int4_experts(
    build: Builder, decoder: DecoderSpec, spec: ExpertsSpec, at: str, held: range, part: slice, scheme: Int4
) -> Experts:
    weights, hidden, inner = build.weights, decoder.hidden_size, spec.intermediate_size
    parts = ("packed", "scales", "zeros")
    ups, downs = ({name: _Pile(len(held)) for name in parts} for _ in range(2))
    for place, expert in enumerate(held):
        halves = [Part(f"{at}.{expert}.{half}", inner, part) for half in (spec.gate, spec.up)]
        up = scheme.read_packed(weights, halves, hidden, WHOLE)
        down = scheme.read_packed(weights, [Part(f"{at}.{expert}.{spec.down}", hidden, WHOLE)], inner, part)
        for piles, weight in ((ups, up), (downs, down)):
            for name in parts:
                piles[name].put(place, [getattr(weight, name)])

    def stacked(piles: dict[str, _Pile]) -> Int4Weight:
        packed, scales = piles["packed"].all, piles["scales"].all
        assert packed is not None
        assert scales is not None
        return Int4Weight(packed, scales, piles["zeros"].all, scheme.group)

    return Experts(
        gate_up=stacked(ups),
        down=stacked(downs),
        activation=decoder.activation,
        first=held.start,
    )


class _Pile:
    """Tensors of one shape, one upon the other, each copied to its place as it is read: they are never held twice."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.all: Tensor | None = None

    def put(self, place: int, parts: Sequence[Tensor | None]) -> None:
        """The parts (or nothing) end to end."""
        found = [part for part in parts if part is not None]
        if not found:
            return
        rows = [part.shape[0] for part in found]
        if self.all is None:
            shape = (self._count, sum(rows), *found[0].shape[1:])
            self.all = torch.empty(shape, dtype=found[0].dtype, device=found[0].device)
        for target, part in zip(self.all[place].split(rows), found, strict=True):
            target.copy_(part)


def cuts_blocks(spec: ExpertsSpec, group: ParallelGroup) -> bool:
    """Whether a rank's share of an expert's inner size cuts MXFP4's blocks of 32, which cannot be kept packed then."""
    return not group.experts_apart and spec.intermediate_size // group.size % 32 != 0


def _stacked_experts(
    build: Builder, decoder: DecoderSpec, spec: ExpertsSpec, at: str, held: range, part: slice
) -> Experts:
    weights, group, hidden = build.weights, build.group, decoder.hidden_size
    inner, count = spec.intermediate_size, spec.num_experts
    rows = slice(held.start, held.stop)
    mine = slice(*part.indices(inner)[:2])
    scheme = build.quantization.scheme_of(f"{at}.{spec.up}")
    if not isinstance(scheme, Plain):
        raise ModelError(
            f"{at}.{spec.up} holds all experts in one tensor, which is served unquantized or in mxfp4: leave "
            "--quantization out, or take the unquantized checkpoint"
        )

    def matrices(name: str, outputs: int, inputs: int, columns: slice, depths: slice) -> Tensor:
        """[experts held, those outputs, those inputs] of [E, outputs, inputs]"""
        if isinstance(scheme, MXFP4):
            return scheme.read_stacked(weights, f"{at}.{name}", (count, outputs, inputs), rows, columns, depths)
        if spec.transposed:
            return weights.take(f"{at}.{name}", (count, inputs, outputs), rows, depths, columns).transpose(1, 2)
        return weights.take(f"{at}.{name}", (count, outputs, inputs), rows, columns, depths)

    def both(read: Callable[[slice], Tensor]) -> Tensor:
        """This rank's gates, then its ups, [E, 2i, ...], of what `read` has of [E, 2I, ...]."""
        if spec.interleaved:
            two = read(slice(2 * mine.start, 2 * mine.stop))
            return two.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2).contiguous()
        return torch.cat((read(mine), read(slice(inner + mine.start, inner + mine.stop))), 1)

    gate_up_scale = down_scale = None
    if isinstance(scheme, MXFP4) and build.ops.packed_experts and not cuts_blocks(spec, group):
        up, up_shape = f"{at}.{spec.up}", (count, 2 * inner, hidden)
        gate_up = both(lambda columns: MXFP4.read_codes(weights, up, up_shape, rows, columns, WHOLE))
        gate_up_scale = both(lambda columns: MXFP4.read_exponents(weights, up, up_shape, rows, columns, WHOLE))
        of_down = (weights, f"{at}.{spec.down}", (count, hidden, inner), rows, WHOLE, mine)
        down, down_scale = MXFP4.read_codes(*of_down), MXFP4.read_exponents(*of_down)
    else:
        gate_up = both(lambda columns: matrices(spec.up, 2 * inner, hidden, columns, WHOLE))
        down = matrices(spec.down, hidden, inner, WHOLE, mine).contiguous()
    gate_up_bias = down_bias = None
    if spec.bias:
        gate_up_bias = both(lambda columns: weights.take(f"{at}.{spec.up}_bias", (count, 2 * inner), rows, columns))
        down_bias = weights.take(f"{at}.{spec.down}_bias", (count, hidden), rows)
    return Experts(
        gate_up=gate_up,
        down=down,
        activation=decoder.activation,
        gate_up_scale=gate_up_scale,
        down_scale=down_scale,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias if part == WHOLE or group.rank == 0 else None,  # once in the sum over the ranks
        first=held.start,
    )
