"""Rotary embedding, head norms and the cache write in one Triton kernel: each byte of qkv is read once from memory."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels.cache_write import CacheScales, HeadNorm, Rope
from quire_kernels.hardware import hardware


@triton.jit
def _turn(cos_sin_ptr, position, frequency, turning, HALF: tl.constexpr):
    """Cosines and sines of a position for the frequencies given; 1 and 0 where not `turning`."""
    at = cos_sin_ptr + position.to(tl.int64) * (2 * HALF) + frequency
    return tl.load(at, mask=turning, other=1.0), tl.load(at + HALF, mask=turning, other=0.0)


@triton.jit
def _store(x, cache_ptr, scale_ptr, head, head_in, dims, slot, KV_HEADS: tl.constexpr, B: tl.constexpr, D: tl.constexpr,
           LIMIT: tl.constexpr):  # fmt: skip
    """x [heads, D] of one token → its slot."""
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + head, mask=head_in, other=1.0)
        x = tl.minimum(tl.maximum(x / scale[:, None], -LIMIT), LIMIT)
    at = ((slot // B * KV_HEADS + head) * B + slot % B)[:, None] * D + dims[None, :]
    tl.store(cache_ptr + at, x.to(cache_ptr.dtype.element_ty), mask=head_in[:, None] & (dims < D)[None, :])


@triton.jit
def _head_weight(q_weight_ptr, k_weight_ptr, dims, dims_in, is_q, UNIT_OFFSET: tl.constexpr):
    """The norm's factors [heads, dims], fp32."""
    q_weight = tl.load(q_weight_ptr + dims, mask=dims_in, other=0.0).to(tl.float32)
    k_weight = tl.load(k_weight_ptr + dims, mask=dims_in, other=0.0).to(tl.float32)
    weight = tl.where(is_q[:, None], q_weight[None, :], k_weight[None, :])
    if UNIT_OFFSET:
        weight += 1.0
    return weight


@triton.jit
def _rope_cache_write(
    qkv_ptr,
    key_ptr,
    value_ptr,
    positions_ptr,
    slots_ptr,
    cos_sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    key_scale_ptr,
    value_scale_ptr,
    qkv_stride: tl.int64,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    B: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    AFTER_ROPE: tl.constexpr,
    LIMIT: tl.constexpr,
    TILE_HEADS: tl.constexpr,
):
    token = tl.program_id(0)
    head = tl.program_id(1) * TILE_HEADS + tl.arange(0, TILE_HEADS)
    dims = tl.arange(0, D_PADDED)
    is_q = head < HEADS
    is_v = head >= HEADS + KV_HEADS
    inside = (head < HEADS + 2 * KV_HEADS)[:, None] & (dims < D)[None, :]
    turned_head = (is_v == 0)[:, None] & inside
    base = qkv_ptr + token.to(tl.int64) * qkv_stride + head[:, None] * D
    raw = tl.load(base + dims[None, :], mask=inside, other=0.0).to(tl.float32)
    x = raw
    shrink = tl.full([TILE_HEADS], 1.0, tl.float32)
    if q_weight_ptr is not None and not AFTER_ROPE:
        shrink = 1.0 / tl.sqrt(tl.sum(x * x, 1) / D + eps)
        x *= shrink[:, None] * _head_weight(q_weight_ptr, k_weight_ptr, dims, dims < D, is_q, UNIT_OFFSET)
    if HALF > 0:
        position = tl.load(positions_ptr + token)
        if INTERLEAVED:
            frequency = tl.arange(0, D_PADDED // 2)
            cosine, sine = _turn(cos_sin_ptr, position, frequency, frequency < HALF, HALF)
            a, b = tl.split(tl.reshape(x, [TILE_HEADS, D_PADDED // 2, 2]))
            c, d = a * cosine[None, :] - b * sine[None, :], b * cosine[None, :] + a * sine[None, :]
            x = tl.reshape(tl.join(c, d), [TILE_HEADS, D_PADDED])
        else:
            turning = dims < 2 * HALF
            first = dims < HALF
            partner = tl.where(turning, tl.where(first, dims + HALF, dims - HALF), dims)
            cosine, sine = _turn(cos_sin_ptr, position, tl.where(first, dims, dims - HALF), turning, HALF)
            other = tl.load(base + partner[None, :], mask=turned_head & turning[None, :], other=0.0).to(tl.float32)
            if q_weight_ptr is not None and not AFTER_ROPE:
                other *= shrink[:, None] * _head_weight(q_weight_ptr, k_weight_ptr, partner, turning, is_q, UNIT_OFFSET)
            x = x * cosine[None, :] + other * tl.where(first, -sine, sine)[None, :]
            tl.debug_barrier()  # partners are read before they are overwritten
    if q_weight_ptr is not None and AFTER_ROPE:
        shrink = 1.0 / tl.sqrt(tl.sum(x * x, 1) / D + eps)
        x *= shrink[:, None] * _head_weight(q_weight_ptr, k_weight_ptr, dims, dims < D, is_q, UNIT_OFFSET)
    tl.store(base + dims[None, :], x.to(qkv_ptr.dtype.element_ty), mask=inside & is_q[:, None])
    slot = tl.load(slots_ptr + token)
    if slot >= 0:
        _store(x, key_ptr, key_scale_ptr, head - HEADS, (is_q == 0) & (is_v == 0), dims, slot, KV_HEADS, B, D, LIMIT)
        _store(
            raw, value_ptr, value_scale_ptr, head - HEADS - KV_HEADS, is_v & (head < HEADS + 2 * KV_HEADS), dims,
            slot, KV_HEADS, B, D, LIMIT,
        )  # fmt: skip


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
    """See the package's contract. `positions` [T] int32; `slots` [T] int64."""
    chip = hardware(qkv.device)
    kv_heads, block_size, head_dim = key_cache.shape[1:]
    padded = triton.next_power_of_2(head_dim)
    heads = num_heads + 2 * kv_heads
    tile = max(1, min(2048 // padded, triton.next_power_of_2(heads)))
    kernel: Any = _rope_cache_write
    kernel[(qkv.shape[0], triton.cdiv(heads, tile))](
        qkv,
        key_cache,
        value_cache,
        positions,
        slots,
        None if rope is None else rope.cos_sin,
        None if norm is None else norm.q_weight,
        None if norm is None else norm.k_weight,
        None if scales is None else scales.key,
        None if scales is None else scales.value,
        qkv.stride(0),
        0.0 if norm is None else norm.eps,
        HEADS=num_heads,
        KV_HEADS=kv_heads,
        D=head_dim,
        D_PADDED=padded,
        B=block_size,
        HALF=0 if rope is None else rope.cos_sin.shape[-1],
        INTERLEAVED=rope is not None and rope.interleaved,
        UNIT_OFFSET=norm is not None and norm.unit_offset,
        AFTER_ROPE=norm is not None and norm.after_rope,
        LIMIT=0.0 if scales is None else torch.finfo(key_cache.dtype).max,
        TILE_HEADS=tile,
        num_warps=2 if chip.amd else 4,
        num_stages=1,
    )


@triton.jit
def _copy_pages(cache_ptr, pairs_ptr, words: tl.int64, COLUMNS: tl.constexpr):
    pair = tl.program_id(0)
    source, target = tl.load(pairs_ptr + 2 * pair), tl.load(pairs_ptr + 2 * pair + 1)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    words_in = columns < words
    copied = tl.load(cache_ptr + source * words + columns, mask=words_in)
    tl.store(cache_ptr + target * words + columns, copied, mask=words_in)


def copy_pages(cache: Tensor, pairs: Tensor) -> None:
    """Pages pairs[:, 0] of cache [P, ...] → pages pairs[:, 1] ([n, 2] int64); none is both read and written."""
    words = cache.view(cache.shape[0], -1).view(torch.int32)
    kernel: Any = _copy_pages
    kernel[(pairs.shape[0], triton.cdiv(words.shape[1], 1024))](
        words, pairs, words.shape[1], COLUMNS=1024, num_warps=4, num_stages=1
    )
