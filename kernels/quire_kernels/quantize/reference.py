"""fp8 quantization in plain torch."""

import torch
from torch import Tensor

from quire_kernels.quantize import BLOCK_COLUMNS, Fp8Output, Quantized, Scales

_LEAST = 1e-12  # of a maximum: rows of zeros have a scale too


def quantize(x: Tensor, output: Fp8Output) -> Quantized:
    """x [T, N] → fp8."""
    limit = torch.finfo(output.dtype).max
    wide = x.float()
    if output.scales is Scales.TENSOR:
        assert output.scale is not None
        return Quantized((wide / output.scale).clamp(-limit, limit).to(output.dtype), output.scale)
    blocks = wide.unflatten(-1, (-1, BLOCK_COLUMNS)) if output.scales is Scales.BLOCK else wide[:, None]
    scale = blocks.abs().amax(-1).clamp(min=_LEAST) / limit
    values = (blocks / scale[..., None]).clamp(-limit, limit).flatten(1).to(output.dtype)
    return Quantized(values, scale if output.scales is Scales.BLOCK else scale[:, 0])


def dequantize(x: Quantized) -> Tensor:
    """What was meant, fp32."""
    wide = x.values.float()
    if x.scale.ndim == 2:
        return (wide.unflatten(-1, (x.scale.shape[1], -1)) * x.scale[..., None]).flatten(1)
    return wide * x.scale[:, None]
