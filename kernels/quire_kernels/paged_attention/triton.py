"""Paged attention in Triton: one kernel for prefill, chunked prefill and decode mixed in a batch.

Legend: M query rows of a tile (query tokens times the heads of a group), N key tokens of a page, D head dim. The
heads of a group are packed into M, so that a page is read once per group (as FlashInfer and vLLM's unified kernel
do). Runs on triton 3.6 to 3.9; under the interpreter it equals the reference in fp32 and fp16.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _paged_attention(
    q_ptr,
    out_ptr,
    key_ptr,
    value_ptr,
    tables_ptr,
    query_starts_ptr,
    context_lens_ptr,
    q_stride: tl.int64,
    out_stride: tl.int64,
    table_stride: tl.int64,
    scale_log2,
    WINDOW: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    request = tl.program_id(0)
    tile = tl.program_id(1)
    head = tl.program_id(2)
    first = tl.load(query_starts_ptr + request)
    count = tl.load(query_starts_ptr + request + 1) - first
    if tile * TILE_TOKENS >= count:
        return
    context = tl.load(context_lens_ptr + request)

    rows = tl.arange(0, M)
    token = tile * TILE_TOKENS + rows // GROUP  # [M]
    group_head = rows % GROUP
    alive = (rows < TILE_TOKENS * GROUP) & (token < count)
    position = context - count + token  # [M]
    dims = tl.arange(0, D_PADDED)
    in_head = dims < D
    flat = (first + token).to(tl.int64)
    column = (head * GROUP + group_head) * D
    q = tl.load(
        q_ptr + flat[:, None] * q_stride + column[:, None] + dims[None, :],
        mask=alive[:, None] & in_head[None, :],
        other=0.0,
    )  # [M, D]

    best = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D_PADDED], tl.float32)
    last = tl.minimum(context, context - count + (tile + 1) * TILE_TOKENS)  # one past the newest key of the tile
    oldest = 0
    if WINDOW > 0:
        oldest = tl.maximum(context - count + tile * TILE_TOKENS - WINDOW + 1, 0) // N * N
    for start in range(oldest, last, N):
        key_at = start + tl.arange(0, N)  # [N]
        page = tl.load(tables_ptr + request * table_stride + key_at // BLOCK_SIZE, mask=key_at < last, other=0)
        slot = (page.to(tl.int64) * KV_HEADS + head) * BLOCK_SIZE + key_at % BLOCK_SIZE
        present = key_at < last
        k = tl.load(
            key_ptr + slot[None, :] * D + dims[:, None], mask=present[None, :] & in_head[:, None], other=0.0
        )  # [D, N]
        scores = tl.dot(q, k, input_precision="ieee") * scale_log2
        visible = (key_at[None, :] <= position[:, None]) & present[None, :]
        if WINDOW > 0:
            visible &= key_at[None, :] > position[:, None] - WINDOW
        scores = tl.where(visible, scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        floor = tl.where(new_best == float("-inf"), 0.0, new_best)  # a row that has seen no key yet
        p = tl.math.exp2(scores - floor[:, None])
        shrink = tl.math.exp2(best - floor)
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(
            value_ptr + slot[:, None] * D + dims[None, :], mask=present[:, None] & in_head[None, :], other=0.0
        )  # [N, D]
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        best = new_best
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]  # rows past the tile have seen no key
    tl.store(
        out_ptr + flat[:, None] * out_stride + column[:, None] + dims[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=alive[:, None] & in_head[None, :],
    )


def paged_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    longest_query: int,
    scale: float,
    window: int = 0,
) -> Tensor:
    """See the package's contract; `query_starts` [R + 1] and `context_lens` [R] are int32 on the device."""
    kv_heads, block_size, head_dim = key_cache.shape[1:]
    group = q.shape[1] // kv_heads
    assert q.stride(1) == head_dim, "heads of a token are consecutive"
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rows = 16 if longest_query * group <= 16 else 64
    rows = max(rows, triton.next_power_of_2(group))
    tile_tokens = rows // group
    grid = (context_lens.shape[0], triton.cdiv(longest_query, tile_tokens), kv_heads)
    kernel: Any = _paged_attention
    kernel[grid](
        q,
        out,
        key_cache,
        value_cache,
        block_tables,
        query_starts,
        context_lens,
        q.stride(0),
        out.stride(0),
        block_tables.stride(0),
        scale * 1.4426950408889634,
        WINDOW=window,
        KV_HEADS=kv_heads,
        GROUP=group,
        D=head_dim,
        D_PADDED=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_SIZE=block_size,
        TILE_TOKENS=tile_tokens,
        M=rows,
        N=max(16, min(64, triton.next_power_of_2(block_size))),
        num_warps=4,
        num_stages=2,
    )
    return out
