"""Rotary embedding and cache write in plain torch."""

import torch
from torch import Tensor


def _normalize(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight


def _rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """x [T, heads, D]; cos_sin [T, 2, half]: the halves of the first 2 * half dimensions turn, the rest stays."""
    half = cos_sin.shape[-1]
    cosine, sine = cos_sin[:, None, 0], cos_sin[:, None, 1]
    a, b = x[..., :half].float(), x[..., half : 2 * half].float()
    turned = torch.cat((a * cosine - b * sine, b * cosine + a * sine), -1).to(x.dtype)
    return torch.cat((turned, x[..., 2 * half :]), -1)


def rope_cache_write(
    qkv: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    positions: Tensor,
    slots: Tensor,
    cos_sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    num_heads: int,
) -> None:
    """See the package's contract. The caches are [P, K, B, D]."""
    kv_heads, block_size, head_dim = key_cache.shape[1:]
    heads = qkv.view(qkv.shape[0], num_heads + 2 * kv_heads, head_dim)
    q, k, v = heads.split((num_heads, kv_heads, kv_heads), 1)
    turn = cos_sin[positions.long()]
    q_new = _rotate(q if q_weight is None else _normalize(q, q_weight, eps), turn)
    k_new = _rotate(k if k_weight is None else _normalize(k, k_weight, eps), turn)
    q.copy_(q_new)
    k.copy_(k_new)
    kept = slots >= 0
    page, offset = slots[kept] // block_size, slots[kept] % block_size
    key_cache[page, :, offset] = k_new[kept]
    value_cache[page, :, offset] = v[kept]
