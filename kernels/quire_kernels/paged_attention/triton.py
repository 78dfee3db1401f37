"""Paged attention in Triton: one entry for prefill, chunked prefill and decode mixed in a batch.

Legend: M query rows of a tile (query tokens times the heads of a group), N key tokens of a tile, D head dim. The heads
of a group are packed into M, so that a page is read once per group (as FlashInfer and vLLM's unified kernel do).
Softmax is online (FlashAttention, Dao et al. 2022) in base 2.

A batch takes at most two launches. The narrow one (few rows) is for requests with few new tokens, whose time is the
reading of the cache; the wide one (rows for wgmma) is for the rest, whose time is the arithmetic. Each leaves out the
requests of the other by looking at their lengths, and cuts the longest of its own into pieces: see `pieces`.
"""

from collections.abc import Hashable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels.hardware import hardware
from quire_kernels.paged_attention import PLAIN, AttentionOptions
from quire_kernels.paged_attention.pieces import LN2, LOG2E, cut, keys_of_tile, merge, pick
from quire_kernels.paged_attention.tiling import launches


@triton.jit
def online_softmax(scores, best, total):
    """Adds a tile of base-2 scores [M, N] to the running maximum and sum [M]; returns weights, shrink, best, total."""
    new_best = tl.maximum(best, tl.max(scores, 1))
    floor = tl.where(new_best == float("-inf"), 0.0, new_best)  # a row that has seen no key yet
    weights = tl.math.exp2(scores - floor[:, None])
    shrink = tl.math.exp2(best - floor)
    return weights, shrink, new_best, total * shrink + tl.sum(weights, 1)


@triton.jit
def slots_of(tables_ptr, start, limit, N: tl.constexpr, BLOCK_SIZE: tl.constexpr, KV_HEADS: tl.constexpr, head):
    """Rows of the cache, seen as [P * K * B, D], that hold the keys start .. start + N of a request."""
    key_at = start + tl.arange(0, N)
    if BLOCK_SIZE % N == 0:
        page = tl.load(tables_ptr + start // BLOCK_SIZE).to(tl.int64)
        return (page * KV_HEADS + head) * BLOCK_SIZE + start % BLOCK_SIZE + tl.arange(0, N)
    page = tl.load(tables_ptr + key_at // BLOCK_SIZE, mask=key_at < limit, other=0).to(tl.int64)
    return (page * KV_HEADS + head) * BLOCK_SIZE + key_at % BLOCK_SIZE


@triton.jit
def _attend(
    acc,
    best,
    total,
    q,
    begin,
    end,
    limit,
    position,
    span_begin,
    span_end,
    slope,
    score_scale,
    key_ptr,
    value_ptr,
    tables_ptr,
    head,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    ALIBI: tl.constexpr,
    SPANS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    N: tl.constexpr,
):
    """The keys begin .. end, in tiles. Not MASKED: every row sees all of them."""
    dims = tl.arange(0, D_PADDED)
    for start in range(begin, end, N):
        start = tl.multiple_of(start, N)
        key_at = start + tl.arange(0, N)
        slot = slots_of(tables_ptr, start, limit, N, BLOCK_SIZE, KV_HEADS, head)
        at = slot[:, None] * D + dims[None, :]
        present = key_at < limit
        if MASKED:
            k = tl.load(key_ptr + at, mask=present[:, None] & (dims < D)[None, :], other=0.0)
        elif D != D_PADDED:
            k = tl.load(key_ptr + at, mask=(dims < D)[None, :], other=0.0)
        else:
            k = tl.load(key_ptr + at)
        scores = tl.dot(q, k.to(q.dtype).T, input_precision="ieee") * score_scale  # [M, N]
        if SOFT_CAP > 0:  # tanh(x) = 1 - 2 / (e^2x + 1)
            scores = (SOFT_CAP * LOG2E) * (1.0 - 2.0 / (tl.math.exp2(scores * (2 * LOG2E)) + 1.0))
        if ALIBI:
            scores -= slope[:, None] * (position[:, None] - key_at[None, :]).to(tl.float32)
        if MASKED:
            visible = key_at[None, :] <= position[:, None]
            if WINDOW > 0:
                visible &= key_at[None, :] > position[:, None] - WINDOW
            if SPANS:
                visible |= (key_at[None, :] >= span_begin[:, None]) & (key_at[None, :] < span_end[:, None])
            scores = tl.where(visible & present[None, :], scores, float("-inf"))
        weights, shrink, best, total = online_softmax(scores, best, total)
        if MASKED:
            v = tl.load(value_ptr + at, mask=present[:, None] & (dims < D)[None, :], other=0.0)
        elif D != D_PADDED:
            v = tl.load(value_ptr + at, mask=(dims < D)[None, :], other=0.0)
        else:
            v = tl.load(value_ptr + at)
        acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc * shrink[:, None], input_precision="ieee")
    return acc, best, total


@triton.jit
def store_rows(out_ptr, lse_ptr, start, row, acc, lse, alive, D: tl.constexpr, D_PADDED: tl.constexpr):
    """acc [M, D] and lse [M] to rows `start` + row."""
    dims = tl.arange(0, D_PADDED)
    tl.store(
        out_ptr + start * D + row[:, None] * D + dims[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=alive[:, None] & (dims < D)[None, :],
    )
    if lse_ptr is not None:
        tl.store(lse_ptr + start + row, lse, mask=alive)


@triton.jit(do_not_specialize=["table_stride", "num_requests", "most"])
def _paged_attention(
    q_ptr,
    out_ptr,
    lse_ptr,
    parts_ptr,
    part_lse_ptr,
    list_ptr,
    key_ptr,
    value_ptr,
    tables_ptr,
    query_starts_ptr,
    context_lens_ptr,
    sinks_ptr,
    slopes_ptr,
    spans_ptr,
    key_scale_ptr,
    value_scale_ptr,
    q_stride: tl.int64,
    table_stride: tl.int64,
    num_requests,
    most,
    scale,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    NARROW_TOKENS: tl.constexpr,
    NARROW: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    head = tl.program_id(1)
    program = tl.program_id(0)
    work, request, tile, piece, pieces = pick(
        program,
        tl.num_programs(0),
        list_ptr,
        most,
        query_starts_ptr,
        context_lens_ptr,
        num_requests,
        TILE_TOKENS,
        NARROW_TOKENS,
        NARROW,
        WINDOW,
    )
    if not work:
        return
    first = tl.load(query_starts_ptr + request)
    count = tl.load(query_starts_ptr + request + 1) - first
    context = tl.load(context_lens_ptr + request)
    tables_ptr += request * table_stride

    rows = tl.arange(0, M)
    token = rows // GROUP  # [M], of the tile; scalars hold what they can of rows' places: it saves spills
    query_head = head * GROUP + rows % GROUP
    oldest_position = context - count + tile * TILE_TOKENS
    alive = token < tl.minimum(count - tile * TILE_TOKENS, TILE_TOKENS)
    position = oldest_position + token
    dims = tl.arange(0, D_PADDED)
    first = (first + tile * TILE_TOKENS).to(tl.int64)
    q = tl.load(
        q_ptr
        + first * q_stride
        + head * (GROUP * D)
        + token[:, None] * q_stride
        + (rows % GROUP)[:, None] * D
        + dims[None, :],
        mask=alive[:, None] & (dims < D)[None, :],
        other=0.0,
    )  # [M, D]

    begin, end = keys_of_tile(context, count, tile, TILE_TOKENS, WINDOW)
    full_begin = 0  # every row sees the keys from here
    if WINDOW > 0:
        full_begin = tl.cdiv(tl.maximum(end - WINDOW, 0), N) * N
    span_begin = position
    span_end = position
    if spans_ptr is not None:
        spans_ptr += 2 * first
        span_begin = tl.load(spans_ptr + 2 * token, mask=alive, other=0)
        span_end = tl.load(spans_ptr + 2 * token + 1, mask=alive, other=0)
        end = tl.minimum(tl.maximum(end, tl.max(span_end, 0)), context)
        begin = tl.minimum(begin, tl.min(tl.where(span_begin < span_end, span_begin, context), 0))
    begin = begin // N * N
    full_end = (oldest_position + 1) // N * N  # ... up to here
    if list_ptr is not None:
        blocks = tl.cdiv(end - begin, N)
        end = tl.minimum(end, begin + (piece + 1) * blocks // pieces * N)
        begin += piece * blocks // pieces * N
    full_begin = tl.minimum(tl.maximum(full_begin, begin), end)
    full_end = tl.minimum(tl.maximum(full_end, full_begin), end)

    score_scale = scale
    if key_scale_ptr is not None:
        score_scale *= tl.load(key_scale_ptr + head)
    if SOFT_CAP > 0:
        score_scale /= SOFT_CAP
    else:
        score_scale *= LOG2E
    slope = tl.zeros([M], tl.float32)
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + query_head, mask=alive, other=0.0) * LOG2E
    best = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    if sinks_ptr is not None:  # in the first piece alone
        sink = tl.load(sinks_ptr + query_head, mask=alive, other=0.0) * LOG2E
        best = tl.where(piece == 0, sink, best)
        total += tl.where(piece == 0, 1.0, 0.0)
    acc = tl.zeros([M, D_PADDED], tl.float32)
    if (WINDOW > 0) | (spans_ptr is not None):
        acc, best, total = _attend(
            acc, best, total, q, begin, full_begin, end, position, span_begin, span_end, slope, score_scale,
            key_ptr, value_ptr, tables_ptr, head, True, WINDOW, SOFT_CAP, slopes_ptr is not None,
            spans_ptr is not None, KV_HEADS, D, D_PADDED, BLOCK_SIZE, N,
        )  # fmt: skip
    acc, best, total = _attend(
        acc, best, total, q, full_begin, full_end, end, position, span_begin, span_end, slope, score_scale,
        key_ptr, value_ptr, tables_ptr, head, False, WINDOW, SOFT_CAP, slopes_ptr is not None,
        False, KV_HEADS, D, D_PADDED, BLOCK_SIZE, N,
    )  # fmt: skip
    acc, best, total = _attend(
        acc, best, total, q, full_end, end, end, position, span_begin, span_end, slope, score_scale,
        key_ptr, value_ptr, tables_ptr, head, True, WINDOW, SOFT_CAP, slopes_ptr is not None,
        spans_ptr is not None, KV_HEADS, D, D_PADDED, BLOCK_SIZE, N,
    )  # fmt: skip

    norm = 1.0 / tl.where(total > 0, total, 1.0)
    if value_scale_ptr is not None:
        norm *= tl.load(value_scale_ptr + head)
    acc *= norm[:, None]
    lse = (best + tl.math.log2(total)) * LN2
    row = token * (KV_HEADS * GROUP) + rows % GROUP
    start = first * (KV_HEADS * GROUP) + head * GROUP
    if list_ptr is not None:
        if pieces > 1:
            start = (program * TILE_TOKENS).to(tl.int64) * (KV_HEADS * GROUP) + head * GROUP
            store_rows(parts_ptr, part_lse_ptr, start, row, acc, lse, alive, D, D_PADDED)
        else:
            store_rows(out_ptr, lse_ptr, start, row, acc, lse, alive, D, D_PADDED)
    else:
        store_rows(out_ptr, lse_ptr, start, row, acc, lse, alive, D, D_PADDED)


def paged_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    longest_query: int,
    scale: float,
    options: AttentionOptions = PLAIN,
    lse: Tensor | None = None,
    invariant: bool = False,
    cuts: dict[Hashable, Tensor] | None = None,
) -> Tensor:
    """See the package's contract; `query_starts` [R + 1] and `context_lens` [R] are int32 on the device.

    `longest_query` may be more than any request has. `lse` [T, H] fp32 is filled where given. `invariant`: one launch
    and one order of keys for all, so that a token's bits do not depend on its neighbours or on the chunk it came in.
    `cuts` keeps, for all layers of a step, how long contexts are cut.
    """
    chip = hardware(q.device)
    kv_heads, block_size, head_dim = key_cache.shape[1:]
    heads = q.shape[1]
    assert q.stride(1) == head_dim, "heads of a token are consecutive"
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    cuts = {} if cuts is None else cuts
    kernel: Any = _paged_attention
    for tiles, launch in launches(chip, q, key_cache, block_tables, longest_query, options.window, invariant):
        pieces = cut(launch, query_starts, context_lens, heads, head_dim, cuts)
        kernel[((launch.most or 0) + launch.tiles, kv_heads)](
            q,
            out,
            lse,
            None if pieces is None else pieces.parts,
            None if pieces is None else pieces.lse,
            None if pieces is None else pieces.listed,
            key_cache,
            value_cache,
            block_tables,
            query_starts,
            context_lens,
            options.sinks,
            options.alibi_slopes,
            options.spans,
            options.key_scale,
            options.value_scale,
            q.stride(0),
            block_tables.stride(0),
            context_lens.shape[0],
            launch.most or 0,
            scale,
            **launch.kernel(),
            SOFT_CAP=options.soft_cap,
            KV_HEADS=kv_heads,
            GROUP=heads // kv_heads,
            D=head_dim,
            D_PADDED=max(16, triton.next_power_of_2(head_dim)),
            BLOCK_SIZE=block_size,
            M=tiles.rows,
            N=tiles.keys,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        if pieces is not None:
            merge(pieces, query_starts, out, lse)
    return out
