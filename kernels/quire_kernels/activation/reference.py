"""Gated activations in plain torch."""

import torch.nn.functional as F
from torch import Tensor


def silu_mul(x: Tensor) -> Tensor:
    """silu(gate) * up (SwiGLU, Shazeer 2020)."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up
