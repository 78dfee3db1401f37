"""Mixture of experts (Shazeer et al. 2017): T tokens, E experts, k of them for a token.

`route(logits [T, E], routing, held)` → weights [T, k] fp32 and experts [T, k] int32, best first. Experts are numbered
from the first of those held here; one that is held elsewhere is len(held), with the weight 0.

`align(experts, E, tile)` sorts the T * k (token, choice) pairs by expert, stably, and pads each expert's to whole
tiles of rows → `Alignment`. Its sizes depend on shapes alone, so that a captured graph stays valid. A pair whose
expert is E (of no expert) gets no row.

`grouped_matmul(a, w [E, N, K], alignment, pairs_per_row)` → [T * k, N]: pair p's row of a is p // pairs_per_row (k
where a holds tokens, 1 where it holds pairs already). fp8 operands come with scales as in `quantized_matmul`, the
weights' one per expert: [E], [E, N] or [E, N / 128, K / 128]. 16-bit or fp32 a may also meet weights in MXFP4 (OCP MX
1.0): w [E, N, K / 2] uint8, two e2m1 numbers a byte, the first in the low half, and exponents [E, N, K / 32] uint8, of
a power of two (less 127) for every 32 of them; or an `Int4Weight` whose tensors are stacked, [E, ...].

`combine(x [T * k, N], weights [T, k])` → [T, N]: the weighted sum over a token's pairs, in the order of its choices.
What weighs 0 adds nothing, whatever stands in its row.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from quire_kernels.activation import Activation
from quire_kernels.quantize import QuantizedOutput
from quire_kernels.quantized_matmul import Int4Weight


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """How experts are chosen."""

    top_k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    correction_bias: Tensor | None = None  # [E] fp32: added to the scores for the choice alone (DeepSeek-V3)
    groups: int = 1  # experts are in so many groups ...
    top_groups: int = 1  # ... of which the best so many take part
    group_score: Literal["max", "top2"] = "top2"  # a group's: its best (DeepSeek-V2), or its two best added up (V3)
    renormalize: bool = True  # the chosen weights add up to 1
    scale: float = 1.0  # the weights' factor


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """The weights of the experts `first` and following, E of them. fp8 and int8 weights come with scales, those in
    MXFP4 with exponents."""

    gate_up: Tensor | Int4Weight  # [E, 2I, H], the gates' outputs first; MXFP4: [E, 2I, H / 2]
    down: Tensor | Int4Weight  # [E, H, I]; MXFP4: [E, H, I / 2]
    activation: Activation = Activation.SILU
    gate_up_bias: Tensor | None = None  # [E, 2I]
    down_bias: Tensor | None = None  # [E, H]
    gate_up_scale: Tensor | None = None  # [E, 2I] or [E, 2I / 128, H / 128]; MXFP4: [E, 2I, H / 32]
    down_scale: Tensor | None = None  # [E, H] or [E, H / 128, I / 128]; MXFP4: [E, H, I / 32]
    inputs: QuantizedOutput | None = None  # how what is multiplied with them is quantized
    first: int = 0

    @property
    def held(self) -> int:
        """E."""
        return (self.down.packed if isinstance(self.down, Int4Weight) else self.down).shape[0]

    @property
    def inner(self) -> int:
        """2I."""
        return self.gate_up.packed.shape[2] if isinstance(self.gate_up, Int4Weight) else self.gate_up.shape[1]


@dataclass(frozen=True, slots=True)
class Alignment:
    """Pairs by expert. S = T * k + E * (tile - 1) at most, rounded up to tiles."""

    pairs: Tensor  # [S] int32, the pair in each row; T * k where the row is padding
    tile_experts: Tensor  # [S / tile] int32, each tile's expert; -1: the tile holds nothing
    tile: int
    num_pairs: int


def aligned_rows(num_pairs: int, num_experts: int, tile: int) -> int:
    """S."""
    return -(-(num_pairs + min(num_experts, num_pairs) * (tile - 1)) // tile) * tile
