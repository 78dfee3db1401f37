"""The GPU's kernels, all of them Triton's."""

import torch
from torch import Tensor

from quire_kernels.activation import Activation
from quire_kernels.activation.triton import activate
from quire_kernels.backends import AttentionBatch, unquantized
from quire_kernels.cache_write import HeadNorm, Rope
from quire_kernels.cache_write.triton import rope_cache_write
from quire_kernels.hardware import hardware
from quire_kernels.norm import Norm
from quire_kernels.norm.triton import add_norm
from quire_kernels.paged_attention import AttentionOptions
from quire_kernels.paged_attention.triton import paged_attention
from quire_kernels.sampling import Rows
from quire_kernels.sampling.triton import draw, prepare


class TritonBackend:
    """On a CPU only under TRITON_INTERPRET=1, which is for tests."""

    name = "triton"

    def __init__(self, device: torch.device) -> None:
        hardware(device)  # refuses what the kernels do not run on

    def paged_attention(
        self,
        q: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        options: AttentionOptions,
    ) -> Tensor:
        return paged_attention(
            q,
            key_cache,
            value_cache,
            batch.block_tables,
            batch.query_starts,
            batch.context_lens,
            batch.longest_query,
            scale,
            options,
        )

    def rope_cache_write(
        self,
        qkv: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: AttentionBatch,
        num_heads: int,
        rope: Rope | None,
        norm: HeadNorm | None,
    ) -> None:
        rope_cache_write(qkv, key_cache, value_cache, batch.positions, batch.slots, num_heads, rope, norm)

    def add_norm(self, residual: Tensor, delta: Tensor | None, weight: Tensor, norm: Norm) -> Tensor:
        return unquantized(add_norm(residual, delta, weight, None, norm))

    def silu_mul(self, x: Tensor) -> Tensor:
        return unquantized(activate(x, Activation.SILU, gated=True))

    def draw(self, logits: Tensor, rows: Rows, filtered: bool) -> Tensor:
        return draw(logits, rows, prepare(logits, rows, filtered))
