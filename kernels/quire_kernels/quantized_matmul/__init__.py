"""Matrix multiplication with quantized weights.

`scaled_matmul`: a [M, K] and w [N, K], both fp8 or both int8, with fp32 scales → [M, N]. a's scale is [1], [M] (per
token) or [M, K / 128]; w's is [1], [N] (per channel) or [N / 128, K / 128] (rounded up); blocks go with blocks. A sum
of 128 products at most is taken before it is added up in fp32 (int8: all in int32). `library_matmul` is torch's own,
for fp8 without blocks.

`int4_matmul`: a [M, K] in bf16 or fp16 and an `Int4Weight` (AWQ, Lin et al. 2023; GPTQ, Frantar et al. 2022).
"""

from dataclasses import dataclass

from torch import Tensor

INT4_CHUNK = 64  # values of K that 32 bytes of a row hold
GROUPS = (32, 64, 128)


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """A weight [N, K] in 4 bits: (value - zero) * scale.

    `packed` [K / 64, N, 32] uint8: byte j of a chunk holds value j in its low half and value 32 + j in its high half,
    so that a tile of the product is one run of memory and unpacks without a shuffle.
    """

    packed: Tensor
    scales: Tensor  # [K / group, N] in a's dtype
    zeros: Tensor | None  # [K / group, N] uint8; None: 8
    group: int
