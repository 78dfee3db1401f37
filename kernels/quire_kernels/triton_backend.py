"""The GPU's kernels. Attention is Triton's; what has no kernel of its own yet runs on torch's operators."""

import itertools
import os

import torch
from torch import Tensor

from quire_kernels.backends import AttentionBatch, TorchBackend
from quire_kernels.paged_attention.triton import paged_attention


class TritonBackend(TorchBackend):
    """On a CPU only under TRITON_INTERPRET=1, which is for tests."""

    name = "triton"

    def __init__(self, device: torch.device) -> None:
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError("attention_backend triton needs a GPU; on a CPU use native or torch")

    def paged_attention(
        self,
        q: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        window: int,
    ) -> Tensor:
        starts = batch.query_starts
        longest = max(end - begin for begin, end in itertools.pairwise(starts))
        return paged_attention(
            q,
            key_cache,
            value_cache,
            batch.block_tables,
            batch.query_starts_tensor,
            batch.context_lens_tensor,
            longest,
            scale,
            window,
        )
