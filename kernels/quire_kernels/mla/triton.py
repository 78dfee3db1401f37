"""Latent attention in Triton: a tile of the cache is read once and serves as keys and as values for all heads.

Legend: M query rows (tokens times heads), N key tokens, L latent and E rotated dimensions.
"""

from collections.abc import Hashable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels.hardware import hardware
from quire_kernels.mla.tiling import launch_of
from quire_kernels.paged_attention.pieces import LN2, LOG2E, cut, keys_of_tile, merge, pick
from quire_kernels.paged_attention.triton import online_softmax, slots_of, store_rows


@triton.jit
def _attend(
    acc, best, total, q, q_turned, begin, end, limit, position, scale, cache_ptr, tables_ptr, MASKED: tl.constexpr,
    L: tl.constexpr, E: tl.constexpr, BLOCK_SIZE: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The keys begin .. end, in tiles. Not MASKED: every row sees all of them."""
    for start in range(begin, end, N):
        start = tl.multiple_of(start, N)
        slot = slots_of(tables_ptr, start, limit, N, BLOCK_SIZE, 1, 0)
        entry = cache_ptr + slot[:, None] * (L + E)
        key_at = start + tl.arange(0, N)
        if MASKED:
            present = (key_at < limit)[:, None]
            latent = tl.load(entry + tl.arange(0, L)[None, :], mask=present, other=0.0)
            turned = tl.load(entry + L + tl.arange(0, E)[None, :], mask=present, other=0.0)
        else:
            latent = tl.load(entry + tl.arange(0, L)[None, :])
            turned = tl.load(entry + L + tl.arange(0, E)[None, :])
        scores = tl.dot(q, latent.T, input_precision="ieee")
        scores = tl.dot(q_turned, turned.T, scores, input_precision="ieee") * scale
        if MASKED:
            scores = tl.where(key_at[None, :] <= position[:, None], scores, float("-inf"))
        weights, shrink, best, total = online_softmax(scores, best, total)
        acc = tl.dot(weights.to(latent.dtype), latent, acc * shrink[:, None], input_precision="ieee")
    return acc, best, total


@triton.jit(do_not_specialize=["table_stride", "num_requests", "most"])
def _latent_attention(
    q_ptr, out_ptr, lse_ptr, parts_ptr, part_lse_ptr, list_ptr, cache_ptr, tables_ptr, query_starts_ptr,
    context_lens_ptr, q_stride: tl.int64, table_stride: tl.int64, num_requests, most, scale,
    HEADS: tl.constexpr, L: tl.constexpr, E: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE_TOKENS: tl.constexpr,
    NARROW_TOKENS: tl.constexpr, NARROW: tl.constexpr, WINDOW: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Heads that do not fit into M go to programs of their own, which follow one another: they read the same pages."""
    head_tiles = tl.cdiv(HEADS, M // TILE_TOKENS)
    program = tl.program_id(0) // head_tiles
    work, request, tile, piece, pieces = pick(
        program,
        tl.num_programs(0) // head_tiles,
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
    # Of the rows' addresses scalars hold what they can: it saves spills.
    token = rows // (M // TILE_TOKENS)  # of the tile
    head = rows % (M // TILE_TOKENS)
    first_head = tl.program_id(0) % head_tiles * (M // TILE_TOKENS)
    alive = (tile * TILE_TOKENS + token < count) & (first_head + head < HEADS)
    position = context - count + tile * TILE_TOKENS + token
    first = (first + tile * TILE_TOKENS).to(tl.int64)
    row = q_ptr + first * q_stride + first_head * (L + E) + token[:, None] * q_stride + head[:, None] * (L + E)
    q = tl.load(row + tl.arange(0, L)[None, :], mask=alive[:, None], other=0.0)
    q_turned = tl.load(row + L + tl.arange(0, E)[None, :], mask=alive[:, None], other=0.0)

    _, end = keys_of_tile(context, count, tile, TILE_TOKENS, WINDOW)
    full_end = (context - count + tile * TILE_TOKENS + 1) // N * N  # every row sees the keys before it
    blocks = tl.cdiv(end, N)
    begin = piece * blocks // pieces * N
    end = tl.minimum(end, (piece + 1) * blocks // pieces * N)
    full_end = tl.minimum(tl.maximum(full_end, begin), end)
    best = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, L], tl.float32)
    acc, best, total = _attend(
        acc, best, total, q, q_turned, begin, full_end, end, position, scale * LOG2E, cache_ptr, tables_ptr, False,
        L, E, BLOCK_SIZE, N,
    )  # fmt: skip
    acc, best, total = _attend(
        acc, best, total, q, q_turned, full_end, end, end, position, scale * LOG2E, cache_ptr, tables_ptr, True,
        L, E, BLOCK_SIZE, N,
    )  # fmt: skip
    acc /= tl.where(total > 0, total, 1.0)[:, None]
    lse = (best + tl.math.log2(total)) * LN2
    row = token * HEADS + head
    if pieces == 1:
        store_rows(out_ptr, lse_ptr, first * HEADS + first_head, row, acc, lse, alive, L, L)
    else:
        start = program.to(tl.int64) * (TILE_TOKENS * HEADS) + first_head
        store_rows(parts_ptr, part_lse_ptr, start, row, acc, lse, alive, L, L)


def latent_attention(
    q: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
    latent: int,
    lse: Tensor | None = None,
    cuts: dict[Hashable, Tensor] | None = None,
) -> Tensor:
    """See the package's contract; `query_starts` [R + 1] and `context_lens` [R] are int32 on the device.

    `cuts` keeps, for all layers of a step, how long contexts are cut.
    """
    chip = hardware(q.device)
    tokens, heads, width = q.shape
    assert q.stride(1) == width, "heads of a token are consecutive"
    out = torch.empty((tokens, heads, latent), dtype=q.dtype, device=q.device)
    tiles, head_tiles, launch = launch_of(chip, q, cache, block_tables)
    pieces = cut(launch, query_starts, context_lens, heads, latent, {} if cuts is None else cuts)
    assert pieces is not None, "there is no window"
    kernel: Any = _latent_attention
    kernel[((pieces.parts.shape[0] + launch.tiles) * head_tiles,)](
        q, out, lse, pieces.parts, pieces.lse, pieces.listed, cache, block_tables, query_starts, context_lens,
        q.stride(0), block_tables.stride(0), context_lens.shape[0], pieces.parts.shape[0], scale,
        **launch.kernel(), HEADS=heads, L=latent, E=width - latent, BLOCK_SIZE=cache.shape[1],
        M=tiles.rows, N=tiles.keys, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    merge(pieces, query_starts, out, lse)
    return out


@triton.jit
def _rotate_pairs(x, cos_sin_ptr, position, R: tl.constexpr, E: tl.constexpr):
    """x [R, E], neighbours are pairs."""
    frequency = tl.arange(0, E // 2)
    cosine = tl.load(cos_sin_ptr + position * E + frequency)[None, :]
    sine = tl.load(cos_sin_ptr + position * E + E // 2 + frequency)[None, :]
    a, b = tl.split(tl.reshape(x, [R, E // 2, 2]))
    return tl.reshape(tl.join(a * cosine - b * sine, b * cosine + a * sine), [R, E])


@triton.jit
def _latent_cache_write(
    latent_ptr, q_rope_ptr, cache_ptr, positions_ptr, slots_ptr, cos_sin_ptr, weight_ptr,
    latent_stride: tl.int64, q_token_stride: tl.int64, q_head_stride: tl.int64, eps,
    HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, L: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + token).to(tl.int64)
    head = tl.arange(0, HEADS_PADDED)
    at = q_rope_ptr + token * q_token_stride + head[:, None] * q_head_stride + tl.arange(0, E)[None, :]
    q = tl.load(at, mask=(head < HEADS)[:, None], other=0.0).to(tl.float32)
    q = _rotate_pairs(q, cos_sin_ptr, position, HEADS_PADDED, E)
    tl.store(at, q.to(q_rope_ptr.dtype.element_ty), mask=(head < HEADS)[:, None])
    slot = tl.load(slots_ptr + token)
    if slot >= 0:
        x = tl.load(latent_ptr + token * latent_stride + tl.arange(0, L)).to(tl.float32)
        x *= 1.0 / tl.sqrt(tl.sum(x * x, 0) / L + eps)
        x *= tl.load(weight_ptr + tl.arange(0, L)).to(tl.float32)
        entry = cache_ptr + slot * (L + E)
        tl.store(entry + tl.arange(0, L), x.to(cache_ptr.dtype.element_ty))
        turned = tl.load(latent_ptr + token * latent_stride + L + tl.arange(0, E))[None, :].to(tl.float32)
        turned = _rotate_pairs(turned, cos_sin_ptr, position, 1, E)
        tl.store(entry + L + tl.arange(0, E)[None, :], turned.to(cache_ptr.dtype.element_ty))


def latent_cache_write(
    latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    positions: Tensor,
    slots: Tensor,
    cos_sin: Tensor,
    weight: Tensor,
    eps: float,
) -> None:
    """See the package's contract. Rows of latent and q_rope may be strided."""
    hardware(latent.device)
    heads, turned = q_rope.shape[1:]
    kernel: Any = _latent_cache_write
    kernel[(latent.shape[0],)](
        latent, q_rope, cache, positions, slots, cos_sin, weight,
        latent.stride(0), q_rope.stride(0), q_rope.stride(1), eps,
        HEADS=heads, HEADS_PADDED=triton.next_power_of_2(heads), L=weight.shape[0], E=turned, num_warps=1,
    )  # fmt: skip
