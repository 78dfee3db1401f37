"""Rotary embedding and cache write in plain torch."""

import torch
from torch import Tensor

from quire_kernels.cache_write import CacheScales, HeadNorm, Rope
from quire_kernels.norm import Norm
from quire_kernels.norm.reference import normalize


def rotate(x: Tensor, positions: Tensor, rope: Rope) -> Tensor:
    """x [T, heads, D], positions [T] → fp32."""
    half = rope.cos_sin.shape[-1]
    turn = rope.cos_sin[positions.long()]  # [T, 2, half]
    cosine, sine = turn[:, None, 0], turn[:, None, 1]
    turning, rest = x[..., : 2 * half].float(), x[..., 2 * half :].float()
    pairs = turning.unflatten(-1, (half, 2)) if rope.interleaved else turning.unflatten(-1, (2, half)).mT
    a, b = pairs.unbind(-1)
    turned = torch.stack((a * cosine - b * sine, b * cosine + a * sine), -1)
    return torch.cat(((turned if rope.interleaved else turned.mT).flatten(-2), rest), -1)


def store(x: Tensor, cache: Tensor, slots: Tensor, scale: Tensor | None) -> None:
    """x [T, K, D] fp32 → the cache's slots."""
    kept = slots >= 0
    page, offset = slots[kept] // cache.shape[2], slots[kept] % cache.shape[2]
    if scale is None:
        cache[page, :, offset] = x[kept].to(cache.dtype)
        return
    limit = torch.finfo(cache.dtype).max
    narrow = (x[kept] / scale[:, None]).clamp(-limit, limit).to(cache.dtype)
    cache.view(torch.uint8)[page, :, offset] = narrow.view(torch.uint8)


def rope_cache_write(
    qkv: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    positions: Tensor,
    slots: Tensor,
    num_heads: int,
    rope: Rope | None,
    norm: HeadNorm | None = None,
    scales: CacheScales | None = None,
) -> None:
    """See the package's contract. `positions` [T]."""
    kv_heads, _, head_dim = key_cache.shape[1:]
    heads = qkv.view(qkv.shape[0], num_heads + 2 * kv_heads, head_dim)
    q, k, v = heads.split((num_heads, kv_heads, kv_heads), 1)
    wide_q, wide_k = q.float(), k.float()
    turned_first = norm is not None and norm.after_rope
    if rope is not None and turned_first:
        wide_q, wide_k = rotate(wide_q, positions, rope), rotate(wide_k, positions, rope)
    if norm is not None:
        kind = Norm(norm.eps, unit_offset=norm.unit_offset)
        wide_q = normalize(wide_q, norm.q_weight, None, kind)
        wide_k = normalize(wide_k, norm.k_weight, None, kind)
    if rope is not None and not turned_first:
        wide_q, wide_k = rotate(wide_q, positions, rope), rotate(wide_k, positions, rope)
    q.copy_(wide_q)
    store(wide_k, key_cache, slots, None if scales is None else scales.key)
    store(v.float(), value_cache, slots, None if scales is None else scales.value)


def copy_pages(cache: Tensor, pairs: Tensor) -> None:
    """Pages pairs[:, 0] of cache [P, ...] → pages pairs[:, 1]; none is both read and written."""
    raw = cache.view(torch.uint8)
    raw[pairs[:, 1].long()] = raw[pairs[:, 0].long()]
