"""fp8 and int8 quantization in plain torch."""

import torch
from torch import Tensor

from quire_kernels.quantize import BLOCK_COLUMNS, Quantized, QuantizedOutput, Scales

_LEAST = 1e-12  # of a maximum: rows of zeros have a scale too


def quantize(x: Tensor, output: QuantizedOutput) -> Quantized:
    """x [T, N] → fp8 or int8."""
    if x.device.type == "meta":  # hundreds of experts, whose shapes alone are planned with
        return output.empty(x.shape[0], x.shape[1], x.device)
    limit = output.limit
    wide = x.float()
    if output.scales is Scales.TENSOR:
        assert output.scale is not None
        return Quantized(_narrow(wide / output.scale, output), output.scale)
    blocks = wide.unflatten(-1, (-1, BLOCK_COLUMNS)) if output.scales is Scales.BLOCK else wide[:, None]
    scale = blocks.abs().amax(-1).clamp(min=_LEAST) / limit
    values = _narrow((blocks / scale[..., None]).flatten(1), output)
    return Quantized(values, scale if output.scales is Scales.BLOCK else scale[:, 0])


def _narrow(scaled: Tensor, output: QuantizedOutput) -> Tensor:
    near = (scaled + 0.5).floor() if output.dtype == torch.int8 else scaled
    return near.clamp(-output.limit, output.limit).to(output.dtype)


def dequantize(x: Quantized) -> Tensor:
    """What was meant, fp32."""
    wide = x.values.float()
    if x.scale.ndim == 2:
        return (wide.unflatten(-1, (x.scale.shape[1], -1)) * x.scale[..., None]).flatten(1)
    return wide * x.scale[:, None]
