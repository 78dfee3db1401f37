"""RMSNorm with residual addition in plain torch."""

import torch
from torch import Tensor


def add_rms_norm(residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """See the package's contract. The mean of squares is taken in fp32."""
    if delta is not None:
        residual += delta
    wide = residual.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide.to(residual.dtype) * weight
