"""How attention cuts long contexts into pieces of about equal work (Flash-Decoding, stream-K), for all its launches.

A launch consists of tiles: new tokens of one request with the keys that they read. Once a step, `cut` lists on the
device the pieces of those tiles that have far more keys than the others: a program for each piece writes a part, and
`merge` joins the parts of a tile. All other tiles are read by one program each, which writes the result itself. How
many pieces there can be follows from shapes alone, so a captured graph stays valid; how many there are and where they
are cut follows from the contexts, so one long request among many fills the chip.

The list is int32 [1 + most, 4]: (the keys of a piece, how many pieces are listed), then for each of these (request, its
tile, piece, pieces of this tile), the pieces of a tile in a row. What lies behind the listed ones is never read.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels.paged_attention.tiling import PIECE_KEYS, Tiling

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
_BLOCK, _PIECES = 128, 32  # tiles, and pieces of each, that the list is made of at a time
_MERGED = 4096  # numbers that a program of `merge` holds at a time; twice as many spill


@triton.jit
def request_of_tile(starts_ptr, tile, num_requests, TILE_TOKENS: tl.constexpr):
    """Request r owns the tiles from query_starts[r] // TILE_TOKENS + r on; returns (r, which of its tiles)."""
    low = tile * 0
    size = num_requests
    while size > 1:
        half = size // 2
        starts = tl.load(starts_ptr + low + half) // TILE_TOKENS + low + half
        low = tl.where(starts <= tile, low + half, low)
        size -= half
    return low, tile - (tl.load(starts_ptr + low) // TILE_TOKENS + low)


@triton.jit
def keys_of_tile(context, count, tile, TILE_TOKENS: tl.constexpr, WINDOW: tl.constexpr):
    """The keys begin .. end that the tokens of a request's tile see, as spans leave it."""
    oldest = context - count + tile * TILE_TOKENS
    begin = oldest * 0
    if WINDOW > 0:
        begin = tl.maximum(oldest - WINDOW + 1, 0)
    return begin, tl.minimum(context, oldest + TILE_TOKENS)


@triton.jit
def _pieces_of(keys, length):
    """Into how many pieces of about `length` a tile is cut: at most 4/3 keys / length where these are 2 or more."""
    return tl.maximum((keys + length // 2) // length, 1)


@triton.jit
def _look(
    query_starts_ptr, context_lens_ptr, tile, num_requests,
    TILE_TOKENS: tl.constexpr, NARROW_TOKENS: tl.constexpr, NARROW: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """→ (request, its tile, the keys that it reads; 0: it has no tokens, or another launch's)."""
    if NARROW:
        request = tl.minimum(tile, num_requests - 1)
        place = tile - request
    else:
        request, place = request_of_tile(query_starts_ptr, tile, num_requests, TILE_TOKENS)
    count = tl.load(query_starts_ptr + request + 1) - tl.load(query_starts_ptr + request)
    if NARROW:
        mine = (place == 0) & (count > 0) & (count <= NARROW_TOKENS)
    else:
        mine = (place * TILE_TOKENS < count) & (count > NARROW_TOKENS)
    begin, end = keys_of_tile(tl.load(context_lens_ptr + request), count, place, TILE_TOKENS, WINDOW)
    return request, place, tl.where(mine, end - begin, 0)


@triton.jit
def pick(
    program, programs, list_ptr, most, query_starts_ptr, context_lens_ptr, num_requests,
    TILE_TOKENS: tl.constexpr, NARROW_TOKENS: tl.constexpr, NARROW: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """A program's work among `programs`, of which `most` are for pieces and then one is for each tile: (whether any,
    request, its tile, piece, pieces). The last tiles have the most keys: they start first. No list: none is cut."""
    if list_ptr is None:
        request, tile, keys = _look(
            query_starts_ptr, context_lens_ptr, programs - 1 - program, num_requests,
            TILE_TOKENS, NARROW_TOKENS, NARROW, WINDOW,
        )  # fmt: skip
        work = keys > 0
        piece = 0
        pieces = 1
    else:
        if program < most:
            work = program < tl.load(list_ptr + 1)
            entry = list_ptr + 4 * (1 + program)
            request = tl.load(entry, mask=work, other=0)
            tile = tl.load(entry + 1, mask=work, other=0)
            piece = tl.load(entry + 2, mask=work, other=0)
            pieces = tl.load(entry + 3, mask=work, other=1)
        else:
            request, tile, keys = _look(
                query_starts_ptr, context_lens_ptr, programs - 1 - program, num_requests,
                TILE_TOKENS, NARROW_TOKENS, NARROW, WINDOW,
            )  # fmt: skip
            work = (keys > 0) & (_pieces_of(keys, tl.load(list_ptr)) == 1)
            piece = 0
            pieces = 1
    return work, request, tile, piece, pieces


@triton.jit(do_not_specialize=["num_requests", "num_tiles", "programs"])
def _cut(
    list_ptr, query_starts_ptr, context_lens_ptr, num_requests, num_tiles, programs,
    TILE_TOKENS: tl.constexpr, NARROW_TOKENS: tl.constexpr, NARROW: tl.constexpr, WINDOW: tl.constexpr,
    LEAST: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([BLOCK], tl.int64)
    for start in range(0, num_tiles, BLOCK):
        _, _, keys = _look(
            query_starts_ptr, context_lens_ptr, start + tl.arange(0, BLOCK), num_requests,
            TILE_TOKENS, NARROW_TOKENS, NARROW, WINDOW,
        )  # fmt: skip
        total += keys
    length = tl.maximum(tl.cdiv(tl.sum(total, 0), programs), LEAST).to(tl.int32)
    used = 0
    for start in range(0, num_tiles, BLOCK):
        request, tile, keys = _look(
            query_starts_ptr, context_lens_ptr, start + tl.arange(0, BLOCK), num_requests,
            TILE_TOKENS, NARROW_TOKENS, NARROW, WINDOW,
        )  # fmt: skip
        pieces = _pieces_of(keys, length)
        pieces = tl.where(pieces > 1, pieces, 0)
        first = used + tl.cumsum(pieces, 0) - pieces
        for begin in range(0, tl.max(pieces, 0), PIECES):
            piece = begin + tl.arange(0, PIECES)[None, :]
            there = piece < pieces[:, None]
            entry = list_ptr + 4 * (1 + first[:, None] + piece)
            tl.store(entry, request[:, None], mask=there)
            tl.store(entry + 1, tile[:, None], mask=there)
            tl.store(entry + 2, piece, mask=there)
            tl.store(entry + 3, pieces[:, None], mask=there)
        used += tl.sum(pieces, 0)
    tl.store(list_ptr, length)
    tl.store(list_ptr + 1, used)


@triton.jit
def _merge(
    parts_ptr, part_lse_ptr, out_ptr, lse_ptr, list_ptr, query_starts_ptr,
    HEADS: tl.constexpr, TILE_TOKENS: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
    TOKENS: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """A program for each piece and head: it joins every so many of the tile's tokens, all pieces of each."""
    program = tl.program_id(0)
    head = tl.program_id(1)
    if program >= tl.load(list_ptr + 1):
        return
    entry = list_ptr + 4 * (1 + program)
    request = tl.load(entry)
    tile = tl.load(entry + 1)
    piece = tl.load(entry + 2)
    pieces = tl.load(entry + 3)
    first = tl.load(query_starts_ptr + request) + tile * TILE_TOKENS
    live = tl.minimum(tl.load(query_starts_ptr + request + 1) - first, TILE_TOKENS)
    dims = tl.arange(0, D_PADDED)
    for start in range(piece * TOKENS, live, pieces * TOKENS):
        token = start + tl.arange(0, TOKENS)
        best = tl.full([TOKENS], float("-inf"), tl.float32)
        total = tl.zeros([TOKENS], tl.float32)
        acc = tl.zeros([TOKENS, D_PADDED], tl.float32)
        for begin in range(0, pieces, PIECES):
            other = begin + tl.arange(0, PIECES)
            there = (other < pieces)[:, None] & (token < live)[None, :]
            row = ((program - piece + other)[:, None] * TILE_TOKENS + token[None, :]).to(tl.int64) * HEADS + head
            lse = tl.load(part_lse_ptr + row, mask=there, other=float("-inf"))  # [PIECES, TOKENS]
            part = tl.load(
                parts_ptr + row[:, :, None] * D + dims[None, None, :],
                mask=there[:, :, None] & (dims < D)[None, None, :],
                other=0.0,
            )
            new_best = tl.maximum(best, tl.max(lse, 0))
            floor = tl.where(new_best == float("-inf"), 0.0, new_best)
            weights = tl.math.exp2((lse - floor[None, :]) * LOG2E)
            shrink = tl.math.exp2((best - floor) * LOG2E)
            total = total * shrink + tl.sum(weights, 0)
            acc = acc * shrink[:, None] + tl.sum(weights[:, :, None] * part, 0)
            best = new_best
        flat = (first + token).to(tl.int64) * HEADS + head
        acc /= tl.where(total > 0, total, 1.0)[:, None]
        tl.store(
            out_ptr + flat[:, None] * D + dims[None, :],
            acc.to(out_ptr.dtype.element_ty),
            mask=(token < live)[:, None] & (dims < D)[None, :],
        )
        if lse_ptr is not None:
            tl.store(lse_ptr + flat, best + tl.math.log2(total) * LN2, mask=token < live)


@dataclass(frozen=True, slots=True)
class Pieces:
    """What a launch needs to cut its tiles."""

    listed: Tensor  # int32 [1 + most, 4]: see above
    parts: Tensor  # fp32 [most, tile_tokens, H, D]
    lse: Tensor  # fp32 [most, tile_tokens, H]


def cut(
    launch: Tiling, query_starts: Tensor, context_lens: Tensor, heads: int, head_dim: int,
    cuts: dict[Hashable, Tensor],
) -> Pieces | None:  # fmt: skip
    """The list, made if the step has none yet in `cuts`, and room for the parts; None where no tile is ever cut."""
    if launch.most is None:
        return None
    device = query_starts.device
    listed = cuts.get(launch)
    if listed is None:
        listed = cuts[launch] = torch.empty((1 + launch.most, 4), dtype=torch.int32, device=device)
        kernel: Any = _cut
        kernel[(1,)](
            listed, query_starts, context_lens, context_lens.shape[0], launch.tiles, launch.programs,
            **launch.kernel(), LEAST=PIECE_KEYS, BLOCK=_BLOCK, PIECES=_PIECES, num_warps=4,
        )  # fmt: skip
    shape = (launch.most, launch.tile_tokens, heads)
    parts = torch.empty((*shape, head_dim), dtype=torch.float32, device=device)
    return Pieces(listed, parts, torch.empty(shape, dtype=torch.float32, device=device))


def merge(pieces: Pieces, query_starts: Tensor, out: Tensor, lse: Tensor | None) -> None:
    """Joins the parts of each tile that was cut into its rows of out [T, H, D] and lse [T, H]."""
    most, tile_tokens, heads, head_dim = pieces.parts.shape
    if most == 0:
        return
    padded = max(16, triton.next_power_of_2(head_dim))
    tokens = 4 if tile_tokens >= 16 else 1
    kernel: Any = _merge
    kernel[(most, heads)](
        pieces.parts, pieces.lse, out, lse, pieces.listed, query_starts,
        HEADS=heads, TILE_TOKENS=tile_tokens, D=head_dim, D_PADDED=padded,
        TOKENS=tokens, PIECES=max(1, _MERGED // (tokens * padded)), num_warps=4, num_stages=1,
    )  # fmt: skip
