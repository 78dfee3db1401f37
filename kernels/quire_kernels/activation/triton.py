"""Activations in Triton."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels.activation import CLAMP, SHARPNESS, Activation
from quire_kernels.hardware import hardware
from quire_kernels.quantize import Quantized, QuantizedOutput, Scales
from quire_kernels.quantize.triton import store_quantized

_CLAMP = tl.constexpr(CLAMP)
_SHARPNESS = tl.constexpr(SHARPNESS)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activation_of(x, KIND: tl.constexpr):
    """f(x) of the enumeration, fp32."""
    if KIND == 1:
        x = x * _sigmoid(x)
    elif KIND == 2:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == 3:  # (1 + tanh(y)) / 2 = sigmoid(2y)
        x = x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif KIND == 4:
        x = tl.maximum(x, 0.0)
        x = x * x
    elif KIND == 6:
        x = tl.maximum(x, 0.0)
    elif KIND == 7:
        x = _sigmoid(x)
    return x


@triton.jit
def _activate(
    x_ptr,
    out_ptr,
    scale_ptr,
    x_stride: tl.int64,
    width,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    SCALES: tl.constexpr,
    LIMIT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) + tl.arange(0, 1)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    at = x_ptr + row.to(tl.int64)[:, None] * x_stride + columns[None, :]
    x = tl.load(at, mask=inside[None, :], other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(at + width, mask=inside[None, :], other=0.0).to(tl.float32)
        if KIND == 5:
            x = tl.minimum(x, _CLAMP)
            up = tl.minimum(tl.maximum(up, -_CLAMP), _CLAMP)
            x = x * _sigmoid(x * _SHARPNESS) * (up + 1.0)
        else:
            x = activation_of(x, KIND) * up
    else:
        x = activation_of(x, KIND)
    if SCALES == 0:
        to = out_ptr + row.to(tl.int64)[:, None] * width + columns[None, :]
        tl.store(to, x.to(out_ptr.dtype.element_ty), mask=inside[None, :])
    else:
        store_quantized(x, out_ptr, scale_ptr, row, columns, row >= 0, inside, width, SCALES, LIMIT, 1, COLUMNS)


def activate(x: Tensor, kind: Activation, gated: bool, output: QuantizedOutput | None = None) -> Tensor | Quantized:
    """See the package's contract. Rows may be strided."""
    assert gated or kind is not Activation.SWIGLU_CLAMPED, "clamped SwiGLU has a gate"
    chip = hardware(x.device)
    rows, width = x.shape[0], x.shape[1] // 2 if gated else x.shape[1]
    columns = max(128, triton.next_power_of_2(width))
    if output is None or output.scales is not Scales.TOKEN:
        columns = min(1024, columns)
    quantized = None if output is None else output.empty(rows, width, x.device)
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device) if quantized is None else quantized.values
    kernel: Any = _activate
    kernel[(rows, triton.cdiv(width, columns))](
        x,
        out,
        None if quantized is None else quantized.scale,
        x.stride(0),
        width,
        KIND=int(kind),
        GATED=gated,
        SCALES=0 if output is None else int(output.scales),
        LIMIT=0.0 if output is None else output.limit,
        COLUMNS=columns,
        num_warps=max(1, min(16, columns // (512 if chip.amd else 256))),
        num_stages=1,
    )
    return out if quantized is None else quantized
