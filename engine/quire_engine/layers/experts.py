"""Mixture of experts over the ranks: each holds a slice of every expert or, with expert parallelism, whole experts."""

import torch
from quire_kernels.activation import Activation
from quire_kernels.moe import Experts, Routing
from torch import Tensor

from quire_engine.errors import ModelError
from quire_engine.layers.feed_forward import FeedForward
from quire_engine.layers.linear import Builder, shard
from quire_engine.models.spec import DecoderSpec, ExpertsSpec, joined
from quire_engine.quantization.schemes import WHOLE, Part, Plain, Stored


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
        self._shared_gate: Tensor | None = None
        if spec.shared_size:
            base = layer if spec.shared_beside else at
            names = (spec.gate, spec.up, spec.down)
            if spec.stacked:
                names = (decoder.names.gate, decoder.names.up, decoder.names.down)
            self._shared = FeedForward(build, decoder, f"{base}.{spec.shared}", spec.shared_size, names, summed=False)
            if spec.shared_gate:
                self._shared_gate = weights.take(f"{base}.{spec.shared_gate}.weight", (1, hidden))

    def __call__(self, x: Tensor) -> Tensor:
        out = self._ops.experts(x, self._router(x), self._routing, self._experts)
        if self._shared is not None:
            wanted = self._shared.input
            shared = self._shared(x if wanted is None else self._ops.activate(x, Activation.IDENTITY, False, wanted))
            if self._shared_gate is not None:
                shared *= torch.sigmoid(torch.nn.functional.linear(x, self._shared_gate))
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
    partial = len(held) < spec.num_experts
    if spec.stacked:
        if not isinstance(build.quantization.scheme_of(f"{at}.{spec.up}"), Plain):
            raise ModelError(
                f"{at}.{spec.up} holds all experts in one tensor, which is served unquantized alone: leave --quantization "
                "out, or take the unquantized checkpoint"
            )
        rows = slice(held.start, held.stop)
        taken = range(inner)[part]
        halves = [
            weights.take(f"{at}.{spec.up}", (spec.num_experts, 2 * inner, hidden), rows, slice(*cut))
            for cut in ((taken.start, taken.stop), (inner + taken.start, inner + taken.stop))
        ]
        down = weights.take(f"{at}.{spec.down}", (spec.num_experts, hidden, inner), rows)
        return Experts(
            gate_up=torch.cat(halves, 1),
            down=down[:, :, part].contiguous(),
            activation=decoder.activation,
            first=held.start,
            partial=partial,
        )
    scheme = build.quantization.scheme_of(f"{at}.0.{spec.gate}")
    gate_up: list[Stored] = []
    downs: list[Stored] = []
    for expert in held:
        name = f"{at}.{expert}"
        gate, up = (
            scheme.read(weights, Part(f"{name}.{half}", inner, part), hidden, WHOLE, ops)
            for half in (spec.gate, spec.up)
        )
        gate_up.append(_merged([gate, up]))
        downs.append(scheme.read(weights, Part(f"{name}.{spec.down}", hidden, WHOLE), inner, part, ops))
    return Experts(
        gate_up=_stacked([stored.values for stored in gate_up]),
        down=_stacked([stored.values for stored in downs]),
        activation=decoder.activation,
        gate_up_scale=_stacked_scales(gate_up),
        down_scale=_stacked_scales(downs),
        inputs=scheme.expert_inputs([*gate_up, *downs], ops),
        first=held.start,
        partial=partial,
    )


def _merged(halves: list[Stored]) -> Stored:
    scales = [half.scale for half in halves if half.scale is not None]
    given = [half.input_scale for half in halves if half.input_scale is not None]
    return Stored(
        torch.cat([half.values.view(torch.uint8) for half in halves]).view(halves[0].values.dtype)
        if halves[0].values.dtype.itemsize == 1
        else torch.cat([half.values for half in halves]),
        torch.cat(scales) if scales else None,
        torch.stack(given).amax(0) if given else None,
    )


def _stacked(parts: list[Tensor]) -> Tensor:
    if parts[0].dtype.itemsize == 1:
        return torch.stack([part.view(torch.uint8) for part in parts]).view(parts[0].dtype)
    return torch.stack(parts)


def _stacked_scales(stored: list[Stored]) -> Tensor | None:
    scales = [one.scale for one in stored if one.scale is not None]
    return torch.stack(scales) if scales else None
