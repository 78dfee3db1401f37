"""Paged attention in Triton: one entry for prefill, chunked prefill and decode mixed in a batch.

Legend: M query rows of a tile (query tokens times the heads of a group), N key tokens of a tile, D head dim, S
segments. The heads of a group are packed into M, so that a page is read once per group (as FlashInfer and vLLM's
unified kernel do). Softmax is online (FlashAttention, Dao et al. 2022) in base 2.

A batch takes at most two launches. The narrow one (few rows) is for requests with few new tokens, whose time is the
reading of the cache: it splits their keys into a static number of segments (Flash-Decoding), so that one long request
fills the chip and a captured graph stays valid; `merge` joins them. The wide one (rows for wgmma) is for the rest,
whose time is the arithmetic. Each leaves out the requests of the other by looking at their lengths.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels.hardware import Hardware, hardware
from quire_kernels.paged_attention import PLAIN, AttentionOptions

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
_NARROW_ROWS = 64  # a batch whose requests all fit so many rows takes the narrow launch alone
_SEGMENT_TOKENS = 512  # a segment shorter than this costs more in merging than it wins


@triton.jit
def request_of_block(starts_ptr, block, num_requests, TILE_TOKENS: tl.constexpr):
    """Request r owns the blocks from query_starts[r] // TILE_TOKENS + r on; returns (r, its tile)."""
    low = 0
    high = num_requests
    while low + 1 < high:
        middle = (low + high) // 2
        if tl.load(starts_ptr + middle) // TILE_TOKENS + middle <= block:
            low = middle
        else:
            high = middle
    return low, block - (tl.load(starts_ptr + low) // TILE_TOKENS + low)


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
def _paged_attention(
    q_ptr,
    out_ptr,
    lse_ptr,
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
    out_stride: tl.int64,
    table_stride: tl.int64,
    num_requests,
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
    SEGMENTS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    head = tl.program_id(1)
    segment = tl.program_id(2)
    if NARROW:
        request = tl.program_id(0)
        tile = 0
    else:  # the last tiles have the most keys: they start first
        request, tile = request_of_block(
            query_starts_ptr, tl.num_programs(0) - 1 - tl.program_id(0), num_requests, TILE_TOKENS
        )
    first = tl.load(query_starts_ptr + request)
    count = tl.load(query_starts_ptr + request + 1) - first
    if NARROW:
        if (count == 0) | (count > NARROW_TOKENS):
            return
    elif (tile * TILE_TOKENS >= count) | (count <= NARROW_TOKENS):
        return
    context = tl.load(context_lens_ptr + request)
    tables_ptr += request * table_stride

    rows = tl.arange(0, M)
    token = tile * TILE_TOKENS + rows // GROUP  # [M]
    query_head = head * GROUP + rows % GROUP
    alive = (rows < TILE_TOKENS * GROUP) & (token < count)
    position = context - count + token
    dims = tl.arange(0, D_PADDED)
    flat = (first + token).to(tl.int64)
    q = tl.load(
        q_ptr + flat[:, None] * q_stride + query_head[:, None] * D + dims[None, :],
        mask=alive[:, None] & (dims < D)[None, :],
        other=0.0,
    )  # [M, D]

    oldest_position = context - count + tile * TILE_TOKENS
    newest_position = tl.minimum(context - 1, oldest_position + TILE_TOKENS - 1)
    begin = 0
    full_begin = 0  # every row sees the keys from here
    if WINDOW > 0:
        begin = tl.maximum(oldest_position - WINDOW + 1, 0)
        full_begin = tl.cdiv(tl.maximum(newest_position - WINDOW + 1, 0), N) * N
    end = newest_position + 1
    span_begin = position
    span_end = position
    if spans_ptr is not None:
        span_begin = tl.load(spans_ptr + 2 * flat, mask=alive, other=0)
        span_end = tl.load(spans_ptr + 2 * flat + 1, mask=alive, other=0)
        end = tl.minimum(tl.maximum(end, tl.max(span_end, 0)), context)
        begin = tl.minimum(begin, tl.min(tl.where(span_begin < span_end, span_begin, context), 0))
    begin = begin // N * N
    full_end = (oldest_position + 1) // N * N  # ... up to here
    if SEGMENTS > 1:
        length = tl.cdiv(tl.cdiv(end - begin, N), SEGMENTS) * N
        begin += segment * length
        end = tl.minimum(end, begin + length)
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
    if sinks_ptr is not None:  # in the first segment alone
        sink = tl.load(sinks_ptr + query_head, mask=alive, other=0.0) * LOG2E
        best = tl.where(segment == 0, sink, best)
        total += tl.where(segment == 0, 1.0, 0.0)
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
    if SEGMENTS > 1:  # parts [S, R * NARROW_TOKENS, H, D]
        flat = ((segment * num_requests + request) * NARROW_TOKENS + token).to(tl.int64)
    tl.store(
        out_ptr + flat[:, None] * out_stride + query_head[:, None] * D + dims[None, :],
        (acc * norm[:, None]).to(out_ptr.dtype.element_ty),
        mask=alive[:, None] & (dims < D)[None, :],
    )
    if lse_ptr is not None:
        tl.store(
            lse_ptr + flat * (KV_HEADS * GROUP) + query_head,
            (best + tl.math.log2(total)) * LN2,
            mask=alive,
        )


@triton.jit
def _merge(
    parts_ptr,
    part_lse_ptr,
    out_ptr,
    lse_ptr,
    query_starts_ptr,
    out_stride: tl.int64,
    num_rows,
    HEADS: tl.constexpr,
    NARROW_TOKENS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    S_PADDED: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
):
    row = tl.program_id(0)
    head = tl.program_id(1)
    flat = row
    if query_starts_ptr is not None:
        request = row // NARROW_TOKENS
        token = row % NARROW_TOKENS
        first = tl.load(query_starts_ptr + request)
        count = tl.load(query_starts_ptr + request + 1) - first
        if (token >= count) | (count > NARROW_TOKENS):
            return
        flat = first + token
    segments = tl.arange(0, S_PADDED)
    lse = tl.load(
        part_lse_ptr + (segments * num_rows + row) * HEADS + head, mask=segments < SEGMENTS, other=float("-inf")
    )
    best = tl.max(lse, 0)
    best = tl.where(best == float("-inf"), 0.0, best)
    total = tl.sum(tl.math.exp2((lse - best) * LOG2E), 0)
    dims = tl.arange(0, D_PADDED)
    acc = tl.zeros([D_PADDED], tl.float32)
    for segment in range(SEGMENTS):
        at = (segment * num_rows + row).to(tl.int64) * HEADS + head
        one = tl.load(part_lse_ptr + at)
        if one > float("-inf"):
            part = tl.load(parts_ptr + at * D + dims, mask=dims < D, other=0.0).to(tl.float32)
            acc += part * tl.math.exp2((one - best) * LOG2E)
    acc = tl.where(total > 0, acc / total, 0.0)
    tl.store(
        out_ptr + flat.to(tl.int64) * out_stride + head * D + dims, acc.to(out_ptr.dtype.element_ty), mask=dims < D
    )
    if lse_ptr is not None:
        tl.store(lse_ptr + flat.to(tl.int64) * HEADS + head, best + tl.math.log2(total) * LN2)


def launch_merge(
    parts: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor | None, query_starts: Tensor | None, narrow_tokens: int
) -> None:
    """parts [S, rows, H, D] → out [T, H, D]; with `query_starts` row r * narrow_tokens + t is request r's token t."""
    segments, num_rows, heads, head_dim = parts.shape
    kernel: Any = _merge
    kernel[(num_rows, heads)](
        parts,
        part_lse,
        out,
        lse,
        query_starts,
        out.stride(0),
        num_rows,
        HEADS=heads,
        NARROW_TOKENS=narrow_tokens,
        SEGMENTS=segments,
        S_PADDED=triton.next_power_of_2(segments),
        D=head_dim,
        D_PADDED=triton.next_power_of_2(head_dim),
        num_warps=1 if head_dim <= 128 else 2,
        num_stages=1,
    )


def merge(parts: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """See the reference: [S, T, H, D] and [S, T, H] → [T, H, D] and [T, H]."""
    out = torch.empty_like(parts[0])
    total = torch.empty_like(lse[0])
    launch_merge(parts, lse, out, total, None, 1)
    return out, total


@dataclass(frozen=True, slots=True)
class Tiles:
    """How one launch is cut."""

    rows: int
    keys: int
    warps: int
    stages: int


def narrow_tiles(chip: Hardware, rows: int, head_dim: int, cache_bytes: int) -> Tiles:
    """Few rows: the more bytes in flight the better, within half of the shared memory, for two programs at a time."""
    keys = 64 if head_dim <= 128 else 32
    tile = 2 * keys * triton.next_power_of_2(head_dim) * cache_bytes
    stages = 1 if chip.amd else max(1, min(4, chip.shared_bytes // 2 // tile))
    return Tiles(rows, keys, 4, stages)


def wide_tiles(chip: Hardware, group: int, head_dim: int, element_bytes: int) -> Tiles:
    """Many rows: 128 for two warpgroups; half where fp32 or a wide head would not fit the registers."""
    padded = triton.next_power_of_2(head_dim)
    rows = 128 if padded * element_bytes <= 256 else 64
    rows = max(rows, triton.next_power_of_2(group))
    keys = 64 if padded <= 128 else 32
    warps = 8 if (rows >= 128 or padded >= 256) and not chip.amd else 4
    tile = 2 * keys * padded * element_bytes
    spare = chip.shared_bytes - rows * padded * element_bytes - rows * keys * element_bytes
    stages = 1 if chip.amd else max(1, min(3, spare // tile))
    return Tiles(rows, keys, warps, stages)


def num_segments(chip: Hardware, programs: int, capacity: int) -> int:
    """Into how many segments keys are cut so that about two programs run on every multiprocessor.

    Depends on shapes alone, never on the contexts, so a captured graph stays valid.
    """
    return max(1, min(2 * chip.multiprocessors // programs, triton.cdiv(capacity, _SEGMENT_TOKENS), 64))


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
) -> Tensor:
    """See the package's contract; `query_starts` [R + 1] and `context_lens` [R] are int32 on the device.

    `longest_query` may be more than any request has. `lse` [T, H] fp32 is filled where given. `invariant`: one launch
    and one order of keys for all, so that a token's bits do not depend on its neighbours or on the chunk it came in.
    """
    chip = hardware(q.device)
    kv_heads, block_size, head_dim = key_cache.shape[1:]
    requests, heads = context_lens.shape[0], q.shape[1]
    group = heads // kv_heads
    assert q.stride(1) == head_dim, "heads of a token are consecutive"
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    alone = longest_query * group <= max(_NARROW_ROWS, group)
    rows = max(16, triton.next_power_of_2(group * longest_query if alone else group))
    narrow = narrow_tiles(chip, rows, head_dim, key_cache.element_size())
    narrow_tokens = rows // group
    capacity = block_tables.shape[1] * block_size
    if options.window > 0:
        capacity = min(capacity, options.window)
    segments = num_segments(chip, requests * kv_heads, capacity)

    def launch(tiles: Tiles, grid: tuple[int, ...], to: Tensor, to_lse: Tensor | None, is_narrow: bool) -> None:
        kernel: Any = _paged_attention
        kernel[grid](
            q,
            to,
            to_lse,
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
            to.stride(-3),
            block_tables.stride(0),
            requests,
            scale,
            WINDOW=options.window,
            SOFT_CAP=options.soft_cap,
            KV_HEADS=kv_heads,
            GROUP=group,
            D=head_dim,
            D_PADDED=max(16, triton.next_power_of_2(head_dim)),
            BLOCK_SIZE=block_size,
            TILE_TOKENS=tiles.rows // group,
            NARROW_TOKENS=0 if invariant else narrow_tokens,
            NARROW=is_narrow,
            SEGMENTS=grid[2],
            M=tiles.rows,
            N=tiles.keys,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )

    if invariant:
        alone = False
    elif segments == 1:
        launch(narrow, (requests, kv_heads, 1), out, lse, True)
    else:
        shape = (segments, requests * narrow_tokens, heads)
        parts = torch.empty((*shape, head_dim), dtype=torch.float32, device=q.device)
        part_lse = torch.empty(shape, dtype=torch.float32, device=q.device)
        launch(narrow, (requests, kv_heads, segments), parts, part_lse, True)
        launch_merge(parts, part_lse, out, lse, query_starts, narrow_tokens)
    if not alone:
        wide = wide_tiles(chip, group, head_dim, q.element_size())
        blocks = q.shape[0] // (wide.rows // group) + requests
        launch(wide, (blocks, kv_heads, 1), out, lse, False)
    return out
