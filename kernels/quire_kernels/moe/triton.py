"""Mixture of experts in Triton: choosing, sorting, multiplying, adding up. No host looks on, and no atomics."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels.hardware import Hardware, hardware
from quire_kernels.matmul.triton import MatrixTiles, tile_of_program
from quire_kernels.moe import Alignment, Routing, aligned_rows


@triton.jit(do_not_specialize=["num_tokens"])
def _route(
    logits_ptr,
    bias_ptr,
    weights_ptr,
    experts_ptr,
    num_tokens,
    scale,
    first,
    held,
    SIGMOID: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    TOP2: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    E: tl.constexpr,
    E_PADDED: tl.constexpr,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, E_PADDED)
    inside = (token < num_tokens)[:, None] & (expert < E)[None, :]
    at = token.to(tl.int64)[:, None] * E + expert[None, :]
    logits = tl.load(logits_ptr + at, mask=inside, other=float("-inf")).to(tl.float32)
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    else:
        best = tl.max(logits, 1)
        powers = tl.exp(logits - tl.where(token < num_tokens, best, 0.0)[:, None])
        total = tl.sum(powers, 1)
        scores = powers / tl.where(total > 0, total, 1.0)[:, None]
    choice = scores
    if bias_ptr is not None:
        choice += tl.load(bias_ptr + expert, mask=expert < E, other=0.0)[None, :]
    choice = tl.where((expert < E)[None, :], choice, float("-inf"))
    if GROUPS > 1:  # E is a power of two here
        grouped = tl.reshape(choice, [TOKENS, GROUPS, E_PADDED // GROUPS])
        of_group = tl.max(grouped, 2)  # [TOKENS, GROUPS]
        if TOP2:
            place = tl.argmax(grouped, 2)
            within = tl.arange(0, E_PADDED // GROUPS)
            of_group += tl.max(tl.where(within[None, None, :] == place[:, :, None], float("-inf"), grouped), 2)
        group = tl.arange(0, GROUPS)
        kept = tl.zeros([TOKENS, GROUPS], tl.int32)
        for _ in tl.static_range(TOP_GROUPS):
            chosen = group[None, :] == tl.argmax(of_group, 1)[:, None]
            kept = tl.where(chosen, 1, kept)
            of_group = tl.where(chosen, float("-inf"), of_group)
        choice = tl.reshape(tl.where(kept[:, :, None] == 1, grouped, float("-inf")), [TOKENS, E_PADDED])
    places = tl.arange(0, K_PADDED)
    weights = tl.zeros([TOKENS, K_PADDED], tl.float32)
    experts = tl.zeros([TOKENS, K_PADDED], tl.int32)
    for i in tl.static_range(K):
        best_expert = tl.argmax(choice, 1)  # the lowest of equals
        chosen = expert[None, :] == best_expert[:, None]
        weight = tl.sum(tl.where(chosen, scores, 0.0), 1)
        choice = tl.where(chosen, float("-inf"), choice)
        weights = tl.where(places[None, :] == i, weight[:, None], weights)
        experts = tl.where(places[None, :] == i, best_expert[:, None], experts)
    if RENORMALIZE:
        weights = weights / tl.maximum(tl.sum(weights, 1), 1e-20)[:, None]
    at = token.to(tl.int64)[:, None] * K + places[None, :]
    inside = (token < num_tokens)[:, None] & (places < K)[None, :]
    here = (experts >= first) & (experts < first + held)
    tl.store(weights_ptr + at, tl.where(here, weights * scale, 0.0), mask=inside)
    tl.store(experts_ptr + at, tl.where(here, experts - first, held), mask=inside)


def route(logits: Tensor, routing: Routing, held: range) -> tuple[Tensor, Tensor]:
    """See the package's contract. logits are contiguous."""
    tokens, experts = logits.shape
    hardware(logits.device)
    padded = triton.next_power_of_2(experts)
    if routing.groups > 1 and padded != experts:
        raise ValueError(f"{experts} experts in {routing.groups} groups: the kernel takes powers of two")
    weights = torch.empty((tokens, routing.top_k), dtype=torch.float32, device=logits.device)
    chosen = torch.empty((tokens, routing.top_k), dtype=torch.int32, device=logits.device)
    rows = max(1, 1024 // padded)
    kernel: Any = _route
    kernel[(triton.cdiv(tokens, rows),)](
        logits,
        routing.correction_bias,
        weights,
        chosen,
        tokens,
        routing.scale,
        held.start,
        len(held),
        SIGMOID=routing.score == "sigmoid",
        GROUPS=routing.groups,
        TOP_GROUPS=routing.top_groups,
        TOP2=routing.group_score == "top2",
        RENORMALIZE=routing.renormalize,
        E=experts,
        E_PADDED=padded,
        K=routing.top_k,
        K_PADDED=triton.next_power_of_2(routing.top_k),
        TOKENS=rows,
        num_warps=4,
        num_stages=1,
    )
    return weights, chosen


@triton.jit
def _expert_of(experts_ptr, pair, end, E: tl.constexpr):
    """-1 for pairs of no expert, and from `end` on."""
    expert = tl.load(experts_ptr + pair, mask=pair < end, other=E)
    return tl.where(expert < E, expert, -1)


@triton.jit
def _histogram(experts_ptr, begin, end, E: tl.constexpr, E_PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """How many of the pairs begin : end go to each expert."""
    expert = tl.arange(0, E_PADDED)
    counts = tl.zeros([E_PADDED], tl.int32)
    for start in range(begin, end, BLOCK):
        mine = _expert_of(experts_ptr, start + tl.arange(0, BLOCK), end, E)
        counts += tl.sum((mine[:, None] == expert[None, :]).to(tl.int32), 0)
    return counts


@triton.jit(do_not_specialize=["num_pairs", "chunk_size"])
def _count(
    experts_ptr, counts_ptr, num_pairs, chunk_size, E: tl.constexpr, E_PADDED: tl.constexpr, BLOCK: tl.constexpr
):
    """counts [chunks, E_PADDED]."""
    chunk = tl.program_id(0)
    end = tl.minimum((chunk + 1) * chunk_size, num_pairs)
    counts = _histogram(experts_ptr, chunk * chunk_size, end, E, E_PADDED, BLOCK)
    tl.store(counts_ptr + chunk * E_PADDED + tl.arange(0, E_PADDED), counts)


@triton.jit(do_not_specialize=["num_pairs", "chunk_size", "tiles"])
def _place(
    experts_ptr, counts_ptr, pairs_ptr, tile_experts_ptr, num_pairs, chunk_size, tiles, E: tl.constexpr,
    E_PADDED: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Each program writes the rows of its chunk's pairs; the tiles' experts and padding are shared out among all."""
    chunk, chunks = tl.program_id(0), tl.num_programs(0)
    expert = tl.arange(0, E_PADDED)
    total = tl.zeros([E_PADDED], tl.int32)
    before = tl.zeros([E_PADDED], tl.int32)  # in the chunks that precede this one
    if chunks == 1:  # nothing was counted beforehand
        total += _histogram(experts_ptr, 0, num_pairs, E, E_PADDED, BLOCK)
    else:
        for start in range(0, chunks, CHUNKS):
            other = start + tl.arange(0, CHUNKS)
            at = counts_ptr + other[:, None] * E_PADDED + expert[None, :]
            counts = tl.load(at, mask=(other < chunks)[:, None], other=0)
            total += tl.sum(counts, 0)
            before += tl.sum(tl.where((other < chunk)[:, None], counts, 0), 0)
    padded = (total + TILE - 1) // TILE * TILE
    last = tl.cumsum(padded, 0)
    first = last - padded  # each expert's rows are first : last, of which first : first + total hold pairs

    next_row = first + before
    end = tl.minimum((chunk + 1) * chunk_size, num_pairs)
    for start in range(chunk * chunk_size, end, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        mine = _expert_of(experts_ptr, pair, end, E)
        same = (mine[:, None] == expert[None, :]).to(tl.int32)
        row = tl.sum(same * (next_row[None, :] + tl.cumsum(same, 0)), 1) - 1
        tl.store(pairs_ptr + row, pair, mask=mine >= 0)
        next_row += tl.sum(same, 0)

    for start in range(chunk * TILES, tiles, chunks * TILES):
        tile = start + tl.arange(0, TILES)
        inside = tile < tiles
        # The first expert whose rows end past the tile's start; E_PADDED where the tile holds nothing.
        mine = tl.sum((last[None, :] <= tile[:, None] * TILE).to(tl.int32), 1)
        tl.store(tile_experts_ptr + tile, tl.where(mine < E_PADDED, mine, -1), mask=inside)
        filled = tl.sum(tl.where(mine[:, None] == expert[None, :], (first + total)[None, :], 0), 1)
        row = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
        padding = inside[:, None] & (row >= filled[:, None])
        tl.store(pairs_ptr + row, tl.zeros([TILES, TILE], tl.int32) + num_pairs, mask=padding)


_MOST_CHUNKS = 128  # each program reads the counts of all


def align(experts: Tensor, num_experts: int, tile: int) -> Alignment:
    """See the package's contract. experts [T, k] int32, contiguous."""
    device, num_pairs = experts.device, experts.numel()
    padded = triton.next_power_of_2(num_experts)
    block = max(16, 16384 // padded)
    blocks = triton.cdiv(num_pairs, block)
    chunk = block * (blocks if blocks <= 4 else triton.cdiv(blocks, _MOST_CHUNKS))  # few pairs: all by one program
    chunks = triton.cdiv(num_pairs, chunk)
    rows = aligned_rows(num_pairs, num_experts, tile)
    pairs = torch.empty((rows,), dtype=torch.int32, device=device)
    tile_experts = torch.empty((rows // tile,), dtype=torch.int32, device=device)
    counts = torch.empty((chunks, padded), dtype=torch.int32, device=device)
    sizes = {"E": num_experts, "E_PADDED": padded, "BLOCK": block}
    if chunks > 1:
        count: Any = _count
        count[(chunks,)](experts, counts, num_pairs, chunk, **sizes, num_warps=4)
    place: Any = _place
    place[(chunks,)](
        experts, counts, pairs, tile_experts, num_pairs, chunk, rows // tile, **sizes,
        CHUNKS=max(1, 4096 // padded), TILE=tile, TILES=max(1, 4096 // max(padded, tile)), num_warps=8,
    )  # fmt: skip
    return Alignment(pairs, tile_experts, tile, num_pairs)


@triton.jit
def rows_of_tile(
    pairs_ptr, tile_experts_ptr, num_pairs, tiles_m, N, PAIRS_PER_ROW: tl.constexpr, TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
):  # fmt: skip
    """Of this program's tile of a product: the expert (-1: nothing to do), the pairs, their rows of a, the columns."""
    tile_m, tile_n = tile_of_program(tl.program_id(0), tiles_m, tl.cdiv(N, TILE_N), 8)
    expert = tl.load(tile_experts_ptr + tile_m).to(tl.int64)
    pair = tl.load(pairs_ptr + tile_m * TILE_M + tl.arange(0, TILE_M))
    row = tl.minimum(pair, num_pairs - 1) // PAIRS_PER_ROW  # padding computes the last pair again and is not stored
    return expert, pair, row, tile_n * TILE_N + tl.arange(0, TILE_N)


@triton.jit
def store_pairs(acc, out_ptr, bias_ptr, expert, pair, n, num_pairs, N):
    """acc [tile m, tile n] + bias [E, N] → out [T * k, N]."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + expert * N + tl.minimum(n, N - 1)).to(tl.float32)[None, :]
    inside = (pair < num_pairs)[:, None] & (n < N)[None, :]
    tl.store(out_ptr + pair.to(tl.int64)[:, None] * N + n[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _from_mxfp4(packed, exponents, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr):
    """packed [ROWS, COLUMNS / 2], exponents [ROWS, COLUMNS / 32] → [ROWS, COLUMNS]."""
    codes = tl.interleave(packed & 15, packed >> 4).to(tl.int32)
    exponent, mantissa = (codes >> 1) & 3, codes & 1
    twice = tl.where(exponent == 0, mantissa, (2 + mantissa) << tl.maximum(exponent - 1, 0))  # twice its size, whole
    values = twice.to(tl.float32) * tl.where(codes >= 8, -0.5, 0.5)
    scales = (exponents.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    scaled = tl.reshape(values, [ROWS, COLUMNS // 32, 32]) * scales[:, :, None]
    return tl.reshape(scaled, [ROWS, COLUMNS]).to(DTYPE)  # exact: four bits of it are not 0


@triton.jit(do_not_specialize=["num_pairs", "tiles_m", "a_scale_step"])
def _grouped_matmul(
    a_ptr,
    a_scale_ptr,
    w_ptr,
    w_scale_ptr,
    bias_ptr,
    out_ptr,
    pairs_ptr,
    tile_experts_ptr,
    num_pairs,
    tiles_m,
    N,
    K,
    a_stride: tl.int64,
    a_scale_step,
    SCALES: tl.constexpr,
    W_PER_COLUMN: tl.constexpr,
    PAIRS_PER_ROW: tl.constexpr,
    EVEN_K: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """SCALES: 0 none, 1 per tensor, row or column, 3 per block of 128, 4 MXFP4's exponents. a's are a step apart from
    row to row, 0 where there is one for all."""
    expert, pair, row, n = rows_of_tile(
        pairs_ptr, tile_experts_ptr, num_pairs, tiles_m, N, PAIRS_PER_ROW, TILE_M, TILE_N
    )
    if expert < 0:
        return
    safe_n = tl.minimum(n, N - 1)
    k = tl.arange(0, TILE_K)
    a_at = a_ptr + row.to(tl.int64)[:, None] * a_stride + k[None, :]
    held: tl.constexpr = TILE_K // 2 if SCALES == 4 else TILE_K  # elements of memory in a tile's row
    byte = tl.arange(0, held)
    row_length = K // 2 if SCALES == 4 else K
    w_at = w_ptr + (expert * N + safe_n)[:, None] * row_length + byte[None, :]
    group = tl.arange(0, TILE_K // 32)
    groups_at = (expert * N + safe_n)[:, None] * (K // 32) + group[None, :]
    blocks = tl.cdiv(K, 128)
    acc = tl.zeros([TILE_M, TILE_N], tl.float32)
    for step in range(0, K, TILE_K):
        if EVEN_K:
            a = tl.load(a_at)
            w = tl.load(w_at)
        else:
            a = tl.load(a_at, mask=(k < K - step)[None, :], other=0.0)
            held_in = (byte < row_length - step * held // TILE_K)[None, :]
            if SCALES == 4:
                w = tl.load(w_at, mask=held_in, other=0)
            else:
                w = tl.load(w_at, mask=held_in, other=0.0)
        if SCALES == 4:
            exponents = tl.load(w_scale_ptr + groups_at, mask=(group < (K - step) // 32)[None, :], other=127)
            w = _from_mxfp4(w, exponents, TILE_N, TILE_K, a.dtype)
            groups_at += TILE_K // 32
            acc = tl.dot(a, w.T, acc, input_precision="ieee")
        elif SCALES == 3:
            scale = tl.load(a_scale_ptr + row * blocks + step // 128)[:, None]
            at = (expert * tl.cdiv(N, 128) + safe_n // 128) * blocks + step // 128
            acc += tl.dot(a, w.T) * (scale * tl.load(w_scale_ptr + at)[None, :])
        elif SCALES == 1:
            acc += tl.dot(a, w.T)
        else:
            acc = tl.dot(a, w.T, acc, input_precision="ieee")
        a_at += TILE_K
        w_at += held
    if SCALES == 1:
        acc *= tl.load(a_scale_ptr + row * a_scale_step)[:, None]
        if W_PER_COLUMN:
            acc *= tl.load(w_scale_ptr + expert * N + safe_n)[None, :]
        else:
            acc *= tl.load(w_scale_ptr + expert)
    store_pairs(acc, out_ptr, bias_ptr, expert, pair, n, num_pairs, N)


def rows_per_tile(num_pairs: int, num_experts: int) -> int:
    """The tile for `align`: about what an expert gets, so that little is padding."""
    each = triton.cdiv(num_pairs, num_experts)
    return 16 if each <= 16 else 64 if each <= 96 else 128


def _tiles(chip: Hardware, m: int, element_bytes: int, blocks: bool) -> MatrixTiles:
    k = 32 if element_bytes == 4 else 128 // element_bytes
    stages = 2 if chip.amd else 4
    if m == 16:
        return MatrixTiles(m, 64, k, 4, stages)
    return MatrixTiles(m, 64 if blocks or element_bytes == 4 else 128, k, 8 if m == 128 else 4, stages)


def grouped_matmul(
    a: Tensor,
    w: Tensor,
    alignment: Alignment,
    pairs_per_row: int,
    dtype: torch.dtype,
    a_scale: Tensor | None = None,
    w_scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """See the package's contract; bias [E, N]. w is contiguous, rows of a may be strided."""
    assert w.is_contiguous()
    packed = w.dtype == torch.uint8
    assert packed or (a_scale is None) == (w_scale is None)
    chip = hardware(a.device)
    columns, k = w.shape[1], 2 * w.shape[2] if packed else w.shape[2]
    blocks = w_scale is not None and w_scale.ndim == 3 and not packed
    held_as = a if packed else w
    tiles = _tiles(chip, alignment.tile, a.element_size(), blocks).fits(chip, a.element_size(), held_as.element_size())
    tiles_m = alignment.tile_experts.shape[0]
    out = torch.empty((alignment.num_pairs, columns), dtype=dtype, device=a.device)
    kernel: Any = _grouped_matmul
    kernel[(tiles_m * triton.cdiv(columns, tiles.n),)](
        a,
        a_scale,
        w,
        w_scale,
        bias,
        out,
        alignment.pairs,
        alignment.tile_experts,
        alignment.num_pairs,
        tiles_m,
        columns,
        k,
        a.stride(0),
        int(a_scale is not None and a_scale.numel() > 1),
        SCALES=4 if packed else 0 if w_scale is None else 3 if blocks else 1,
        W_PER_COLUMN=w_scale is not None and w_scale.ndim == 2,
        PAIRS_PER_ROW=pairs_per_row,
        EVEN_K=k % tiles.k == 0,
        TILE_M=tiles.m,
        TILE_N=tiles.n,
        TILE_K=tiles.k,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return out


@triton.jit
def _combine(x_ptr, weights_ptr, out_ptr, width, K: tl.constexpr, COLUMNS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    total = tl.zeros([COLUMNS], tl.float32)
    for i in tl.static_range(K):
        weight = tl.load(weights_ptr + token * K + i)
        weighed = columns < tl.where(weight != 0, width, 0)
        part = tl.load(x_ptr + (token * K + i) * width + columns, mask=weighed, other=0.0)
        total += weight * part.to(tl.float32)
    tl.store(out_ptr + token * width + columns, total.to(out_ptr.dtype.element_ty), mask=inside)


def combine(x: Tensor, weights: Tensor) -> Tensor:
    """See the package's contract. Both are contiguous."""
    chip = hardware(x.device)
    tokens, k = weights.shape
    out = torch.empty((tokens, x.shape[1]), dtype=x.dtype, device=x.device)
    kernel: Any = _combine
    kernel[(tokens, triton.cdiv(x.shape[1], 1024))](
        x, weights, out, x.shape[1], K=k, COLUMNS=1024, num_warps=2 if chip.amd else 4, num_stages=1
    )
    return out
