"""Norms in plain torch."""

import torch
from torch import Tensor

from quire_kernels.norm import Norm
from quire_kernels.quantize import Quantized, QuantizedOutput
from quire_kernels.quantize.reference import quantize


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: Norm) -> Tensor:
    """Over the last dimension, fp32."""
    wide = x.float()
    if norm.kind == "layer":
        wide = wide - wide.mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
    if weight is not None:
        wide = wide * (weight.float() + 1.0 if norm.unit_offset else weight.float())
    return wide if bias is None else wide + bias.float()


def add_norm(
    residual: Tensor,
    delta: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: Norm,
    output: QuantizedOutput | None = None,
) -> Tensor | Quantized:
    """See the package's contract."""
    if delta is not None:
        residual += delta
    wide = normalize(residual, weight, bias, norm)
    return wide.to(residual.dtype) if output is None else quantize(wide, output)


def norm_heads(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm) -> None:
    """See the package's contract."""
    x.copy_(normalize(x, weight, bias, norm))
