"""Norms of a layer's input or result."""

import torch
from quire_kernels.backends import Backend
from quire_kernels.quantize import Quantized, QuantizedOutput
from torch import Tensor

from quire_engine.layers.linear import Builder
from quire_engine.spec import DecoderSpec


class Normalization:
    """norm(residual + delta); the residual [T, hidden] grows by delta in place."""

    def __init__(self, build: Builder, name: str, spec: DecoderSpec) -> None:
        take, shape = build.weights.take, (spec.hidden_size,)
        self._ops = build.ops
        self._kind = spec.norm
        self._weight = take(f"{name}.weight", shape) if spec.norm_weight else None
        self._bias = take(f"{name}.bias", shape) if spec.norm_bias else None

    def __call__(
        self, residual: Tensor, delta: Tensor | None = None, output: QuantizedOutput | None = None
    ) -> Tensor | Quantized:
        """With `output` the result is quantized so."""
        return self._ops.add_norm(residual, delta, self._weight, self._bias, self._kind, output)


class SquaredLength:
    """x [T, width] → [T, 1] fp32, by the backend's product: a sum of torch's is cut up by T on a GPU."""

    def __init__(self, ops: Backend, width: int, device: torch.device) -> None:
        self._sum = ops.linear(torch.ones((1, width), device=device), None)

    def __call__(self, x: Tensor) -> Tensor:
        return self._sum(x.float().square())
