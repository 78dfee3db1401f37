"""The GPU's kernels. Attention is Triton's; what has no kernel of its own yet runs on torch's operators."""

import torch
from torch import Tensor

from quire_kernels.backends import AttentionBatch, TorchBackend
from quire_kernels.hardware import hardware
from quire_kernels.paged_attention import AttentionOptions
from quire_kernels.paged_attention.triton import paged_attention


class TritonBackend(TorchBackend):
    """On a CPU only under TRITON_INTERPRET=1, which is for tests."""

    name = "triton"

    def __init__(self, device: torch.device) -> None:
        hardware(device)

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
            batch.query_starts_tensor,
            batch.context_lens_tensor,
            batch.longest_query,
            scale,
            options,
        )
