"""Latent attention in plain torch: as one key-value head whose values are a part of the keys."""

import torch
from torch import Tensor

from quire_kernels.cache_write import Rope
from quire_kernels.cache_write.reference import rotate
from quire_kernels.norm import Norm
from quire_kernels.norm.reference import normalize
from quire_kernels.paged_attention.reference import attention_with_lse


def latent_attention(
    q: Tensor, cache: Tensor, block_tables: Tensor, query_starts: Tensor, context_lens: Tensor, scale: float,
    latent: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See the package's contract. → result and log-sum-exp."""
    keys = cache[:, None]
    out, lse = attention_with_lse(q, keys, keys, block_tables, query_starts, context_lens, scale)
    return out[..., :latent], lse


def latent_cache_write(
    latent: Tensor, q_rope: Tensor, cache: Tensor, positions: Tensor, slots: Tensor, cos_sin: Tensor, weight: Tensor,
    eps: float,
) -> None:  # fmt: skip
    """See the package's contract."""
    rope, width = Rope(cos_sin=cos_sin, interleaved=True), weight.shape[0]
    normal = normalize(latent[:, :width], weight, None, Norm(eps))
    turned = rotate(latent[:, None, width:], positions, rope)[:, 0]
    q_rope.copy_(rotate(q_rope, positions, rope))
    kept = slots >= 0
    entries = torch.cat((normal, turned), 1)[kept].to(cache.dtype)
    cache[slots[kept] // cache.shape[1], slots[kept] % cache.shape[1]] = entries
