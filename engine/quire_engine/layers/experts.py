"""Mixture of experts over the ranks: each holds a slice of every expert or, with expert parallelism, whole experts."""

import torch
from quire_kernels.moe import Experts, Routing
from torch import Tensor

from quire_engine.layers.linear import Builder, shard
from quire_engine.models.spec import ExpertsSpec
from quire_engine.quantization.schemes import WHOLE, Part, Stored


class MixtureOfExperts:
    """x [T, hidden] → [T, hidden]: the router's choice of experts, weighted and summed."""

    input = None  # the router wants its input as it is

    def __init__(self, build: Builder, spec: ExpertsSpec, at: str, hidden: int) -> None:
        weights, group, ops = build.weights, build.group, build.ops
        self._ops = ops
        self._group = group
        self._router = ops.linear(weights.take(f"{at}.{spec.router}.weight", (spec.num_experts, hidden)), None)
        self._routing = Routing(top_k=spec.top_k, score=spec.score, renormalize=spec.renormalize, scale=spec.scale)
        inner = spec.intermediate_size
        if group.experts_apart:
            held = range(spec.num_experts)[shard(spec.num_experts, group)]
            part = WHOLE
        else:
            held = range(spec.num_experts)
            part = shard(inner, group)
        gates, ups, downs = spec.names
        scheme = build.quantization.scheme_of(f"{at}.experts.0.{gates}")
        gate_up: list[Stored] = []
        down: list[Stored] = []
        for expert in held:
            name = f"{at}.experts.{expert}"
            halves = [
                scheme.read(weights, Part(f"{name}.{half}", inner, part), hidden, WHOLE, ops) for half in (gates, ups)
            ]
            gate_up.append(_merged(halves))
            down.append(scheme.read(weights, Part(f"{name}.{downs}", hidden, WHOLE), inner, part, ops))
        self._experts = Experts(
            gate_up=_stacked([stored.values for stored in gate_up]),
            down=_stacked([stored.values for stored in down]),
            gate_up_scale=_stacked_scales(gate_up),
            down_scale=_stacked_scales(down),
            inputs=scheme.expert_inputs([*gate_up, *down], ops),
            first=held.start,
            partial=len(held) < spec.num_experts,
        )

    def __call__(self, x: Tensor) -> Tensor:
        return self._group.all_reduce(self._ops.experts(x, self._router(x), self._routing, self._experts))


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
