"""Normalization of rows, with the residual addition before it.

Contract of `add_norm`: `residual` [T, N] grows by `delta` [T, N] (where given) in place; the result is its norm.
RMSNorm (Zhang & Sennrich 2019) divides by the root of the mean of squares; LayerNorm (Ba et al. 2016) subtracts the
mean first. Then come `weight` [N] (or 1 + weight: Gemma) and `bias` [N] where given. Everything is computed in fp32
and rounded once; with a `QuantizedOutput` the result is Quantized. Rows may be strided. A row's result depends on
nothing but the row.

Contract of `norm_heads`: the same on every head of x [T, H, D], in place; `weight` is [D] or one per head [H, D].
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Norm:
    """Which normalization."""

    eps: float
    kind: Literal["rms", "layer"] = "rms"
    unit_offset: bool = False  # the factor is 1 + weight
