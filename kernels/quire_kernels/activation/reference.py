"""Activations in plain torch."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from quire_kernels.activation import CLAMP, SHARPNESS, Activation
from quire_kernels.quantize import Quantized, QuantizedOutput
from quire_kernels.quantize.reference import quantize

_FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.IDENTITY: lambda x: x,
    Activation.SILU: F.silu,
    Activation.GELU: F.gelu,
    Activation.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
    Activation.RELU_SQUARED: lambda x: F.relu(x).square(),
    Activation.RELU: F.relu,
    Activation.SIGMOID: torch.sigmoid,
}


def activate(x: Tensor, kind: Activation, gated: bool, output: QuantizedOutput | None = None) -> Tensor | Quantized:
    """See the package's contract."""
    if kind is Activation.SWIGLU_CLAMPED:
        assert gated, "clamped SwiGLU has a gate"
        gate, up = x.float().chunk(2, -1)
        gate, up = gate.clamp(max=CLAMP), up.clamp(-CLAMP, CLAMP)
        wide = gate * torch.sigmoid(SHARPNESS * gate) * (up + 1.0)
    elif gated:
        gate, up = x.float().chunk(2, -1)
        wide = _FUNCTIONS[kind](gate) * up
    else:
        wide = _FUNCTIONS[kind](x.float())
    return wide.to(x.dtype) if output is None else quantize(wide, output)
