"""Triton's kernels, and FlashAttention 3 for long prompts."""

from collections.abc import Callable

import torch
from torch import Tensor

from quire_kernels import flash
from quire_kernels.backends import AttentionBatch
from quire_kernels.paged_attention import AttentionOptions
from quire_kernels.triton_backend import TritonBackend


class FlashBackend(TritonBackend):
    """For the chips in `flash.CHIPS`. Its tokens depend on how a prompt is cut up, so it is never deterministic."""

    name = "flash"

    def __init__(self, device: torch.device, function: Callable[..., Tensor]) -> None:
        """`function`: what `flash.load` found."""
        super().__init__(device)
        self._flash = function

    def paged_attention(
        self,
        q: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        options: AttentionOptions,
    ) -> Tensor:
        if flash.fits(q, key_cache, batch, options):
            return flash.attend(self._flash, q, key_cache, value_cache, batch, scale, options)
        return super().paged_attention(q, key_cache, value_cache, batch, scale, options)
