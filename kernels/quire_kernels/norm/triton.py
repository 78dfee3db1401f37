"""Norms in Triton: whole rows in one program, read once and written once, whatever the batch."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels.hardware import hardware
from quire_kernels.norm import Norm
from quire_kernels.quantize import Quantized, QuantizedOutput
from quire_kernels.quantize.triton import store_quantized


@triton.jit(do_not_specialize=["num_rows"])
def _norm(
    x_ptr,
    delta_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    scale_ptr,
    x_stride: tl.int64,
    delta_stride: tl.int64,
    out_stride: tl.int64,
    num_rows,
    eps,
    HEADS: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    LAYER: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    SCALES: tl.constexpr,
    LIMIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Row r is head r % HEADS of token r // HEADS."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_in = row < num_rows
    columns = tl.arange(0, COLUMNS)
    column_in = columns < WIDTH
    inside = row_in[:, None] & column_in[None, :]
    token = (row // HEADS).to(tl.int64)
    place = (row % HEADS * WIDTH)[:, None] + columns[None, :]
    at = token[:, None] * x_stride + place
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    if delta_ptr is not None:
        delta = tl.load(delta_ptr + token[:, None] * delta_stride + place, mask=inside, other=0.0)
        x = (x.to(tl.float32) + delta.to(tl.float32)).to(x.dtype)
        tl.store(x_ptr + at, x, mask=inside)
    x = x.to(tl.float32)
    if LAYER:
        x = tl.where(inside, x - (tl.sum(x, 1) / WIDTH)[:, None], 0.0)
    x *= (1.0 / tl.sqrt(tl.sum(x * x, 1) / WIDTH + eps))[:, None]
    at = (row % HEADS * WEIGHT_STRIDE)[:, None] + columns[None, :]
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if UNIT_OFFSET:
            weight += 1.0
        x *= weight
    if bias_ptr is not None:
        x += tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if SCALES == 0:
        at = token[:, None] * out_stride + place
        tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        x = tl.where(inside, x, 0.0)
        store_quantized(
            x, out_ptr, scale_ptr, row, columns, row_in, column_in, WIDTH, SCALES, LIMIT, ROWS, COLUMNS
        )  # fmt: skip


def _launch(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: Norm,
    out: Tensor,
    heads: int,
    output: QuantizedOutput | None = None,
    scale: Tensor | None = None,
) -> None:
    chip = hardware(x.device)
    width = x.shape[-1]
    num_rows = x.shape[0] * heads
    columns = max(triton.next_power_of_2(width), 128 if output else 1)
    rows = max(1, min(16, 1024 // columns))
    kernel: Any = _norm
    kernel[(triton.cdiv(num_rows, rows),)](
        x,
        delta,
        weight,
        bias,
        out,
        scale,
        x.stride(0),
        0 if delta is None else delta.stride(0),
        out.stride(0),
        num_rows,
        norm.eps,
        HEADS=heads,
        WEIGHT_STRIDE=width if weight is not None and weight.ndim == 2 else 0,
        WIDTH=width,
        LAYER=norm.kind == "layer",
        UNIT_OFFSET=norm.unit_offset,
        SCALES=0 if output is None else int(output.scales),
        LIMIT=0.0 if output is None else output.limit,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=max(1, min(16, rows * columns // (1024 if chip.amd else 512))),
        num_stages=1,
    )


def add_norm(
    residual: Tensor,
    delta: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: Norm,
    output: QuantizedOutput | None = None,
) -> Tensor | Quantized:
    """See the package's contract."""
    assert residual.stride(-1) == 1
    if output is None:
        out = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
        _launch(residual, delta, weight, bias, norm, out, 1)
        return out
    quantized = output.empty(residual.shape[0], residual.shape[1], residual.device)
    _launch(residual, delta, weight, bias, norm, quantized.values, 1, output, quantized.scale)
    return quantized


def norm_heads(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm) -> None:
    """See the package's contract."""
    assert x.stride(1) == x.shape[2], "heads of a token are consecutive"
    _launch(x, None, weight, bias, norm, x, x.shape[1])
