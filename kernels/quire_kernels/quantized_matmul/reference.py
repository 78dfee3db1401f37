"""Quantized products in plain torch: dequantize, multiply in fp32."""

import torch
from torch import Tensor

from quire_kernels.quantize import BLOCK_COLUMNS
from quire_kernels.quantized_matmul import Int4Weight
from quire_kernels.quantized_matmul.int4 import unpack


def dequantize(x: Tensor, scale: Tensor) -> Tensor:
    """x [R, K] with scale [1], [R], [R, K / 128] or [R / 128, K / 128] → fp32 (int8's and fp8's)."""
    wide = x.float()
    if scale.ndim < 2:
        return wide * scale[:, None]
    if scale.shape[0] != x.shape[0]:
        scale = scale.repeat_interleave(BLOCK_COLUMNS, 0)[: x.shape[0]]
    return wide * scale.repeat_interleave(BLOCK_COLUMNS, 1)[:, : x.shape[1]]


def scaled_matmul(
    a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """See the package's contract."""
    wide = dequantize(a, a_scale) @ dequantize(w, w_scale).T
    return (wide if bias is None else wide + bias.float()).to(dtype)


def dequantize_int4(weight: Int4Weight) -> Tensor:
    """→ [N, K] fp32."""
    values = unpack(weight.packed).float()
    zeros = 8.0 if weight.zeros is None else weight.zeros.float().T.repeat_interleave(weight.group, 1)
    return (values - zeros) * weight.scales.float().T.repeat_interleave(weight.group, 1)


def int4_matmul(a: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    """See the package's contract."""
    wide = a.float() @ dequantize_int4(weight).T
    return (wide if bias is None else wide + bias.float()).to(a.dtype)
