"""Quantized products in Triton."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels.hardware import Hardware, hardware
from quire_kernels.matmul.triton import (
    MatrixTiles,
    num_splits,
    parts_for,
    reduce_splits,
    store_tile,
    tile_of_program,
)
from quire_kernels.quantized_matmul import INT4_CHUNK, Int4Weight


@triton.jit(do_not_specialize=["M", "a_scale_step"])
def _scaled_matmul(
    a_ptr,
    a_scale_ptr,
    w_ptr,
    w_scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    k_per_split,
    a_scale_step,
    w_scale_step,
    BLOCKS: tl.constexpr,
    INTEGER: tl.constexpr,
    EVEN_K: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """Scales are per block of 128 (BLOCKS), or a step apart from row to row: 0 where there is one for all."""
    tile_m, tile_n = tile_of_program(tl.program_id(0), tl.cdiv(M, TILE_M), tl.cdiv(N, TILE_N), 8)
    split = tl.program_id(1)
    m = tile_m * TILE_M + tl.arange(0, TILE_M)
    n = tile_n * TILE_N + tl.arange(0, TILE_N)
    safe_m, safe_n = tl.minimum(m, M - 1), tl.minimum(n, N - 1)  # rows past the end are not stored
    begin = split * k_per_split
    k = begin + tl.arange(0, TILE_K)
    a_at = a_ptr + safe_m.to(tl.int64)[:, None] * K + k[None, :]
    w_at = w_ptr + safe_n.to(tl.int64)[:, None] * K + k[None, :]
    blocks = tl.cdiv(K, 128)
    acc = tl.zeros([TILE_M, TILE_N], tl.int32 if INTEGER else tl.float32)
    for step in range(0, k_per_split, TILE_K):
        if EVEN_K:
            a = tl.load(a_at)
            w = tl.load(w_at)
        else:
            present = (k < K - step)[None, :]
            a = tl.load(a_at, mask=present, other=0.0)
            w = tl.load(w_at, mask=present, other=0.0)
        if BLOCKS:
            block = tl.minimum((begin + step) // 128, blocks - 1)
            scale = tl.load(a_scale_ptr + safe_m * blocks + block)[:, None]
            scale = scale * tl.load(w_scale_ptr + safe_n // 128 * blocks + block)[None, :]
            acc += tl.dot(a, w.T) * scale
        elif INTEGER:
            acc = tl.dot(a, w.T, acc, out_dtype=tl.int32)
        else:
            acc += tl.dot(a, w.T)
        a_at += TILE_K
        w_at += TILE_K
    acc = acc.to(tl.float32)
    if not BLOCKS:
        acc *= tl.load(a_scale_ptr + safe_m * a_scale_step)[:, None]
        acc *= tl.load(w_scale_ptr + safe_n * w_scale_step)[None, :]
    store_tile(acc, out_ptr, bias_ptr, split, m, n, M, N)


def _tiles(chip: Hardware, rows: int, blocks: bool) -> MatrixTiles:
    """For one byte a value: few rows stream the weights, many rows fill the matrix units.

    Blocks of scales need a second accumulator, so their tiles are half as wide.
    """
    stages = 2 if chip.amd else 4
    if rows <= 16:
        return MatrixTiles(16, 64, 128, 4, 2 if chip.amd else 5)
    if rows <= 64:
        return MatrixTiles(64, 64, 128, 4, stages)
    return MatrixTiles(128, 64 if blocks else 128, 128, 8, stages)


def scaled_matmul(
    a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """See the package's contract. a and w are contiguous."""
    assert a.is_contiguous()
    assert w.is_contiguous()
    assert (a_scale.ndim == 2) == (w_scale.ndim == 2), "blocks go with blocks"
    chip, blocks = hardware(a.device), a_scale.ndim == 2
    (rows, k), columns = a.shape, w.shape[0]
    tiles = _tiles(chip, rows, blocks).fits(chip, 1, 1)
    tiles_m, tiles_n = triton.cdiv(rows, tiles.m), triton.cdiv(columns, tiles.n)
    steps = triton.cdiv(k, tiles.k)
    splits = num_splits(chip, tiles_m * tiles_n, steps) if tiles_m == 1 else 1
    per_split = triton.cdiv(steps, splits) * tiles.k
    out = torch.empty((rows, columns), dtype=dtype, device=a.device)
    parts = parts_for(splits, out)
    kernel: Any = _scaled_matmul
    kernel[(tiles_m * tiles_n, splits)](
        a,
        a_scale,
        w,
        w_scale,
        bias if splits == 1 else None,
        parts,
        rows,
        columns,
        k,
        per_split,
        int(a_scale.numel() > 1),
        int(w_scale.numel() > 1),
        BLOCKS=blocks,
        INTEGER=a.dtype == torch.int8,
        EVEN_K=k == per_split * splits,
        TILE_M=tiles.m,
        TILE_N=tiles.n,
        TILE_K=tiles.k,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    reduce_splits(parts, bias, out)
    return out


@triton.jit
def int4_halves(packed, scales_ptr, zeros_ptr, low_at, high_at):
    """What the low and the high halves [32, N] of a chunk's bytes mean, whose scales and zeros [N] are there."""
    low, high = (packed & 15).to(tl.float32), (packed >> 4).to(tl.float32)
    if zeros_ptr is not None:
        low -= tl.load(zeros_ptr + low_at).to(tl.float32)[None, :]
        high -= tl.load(zeros_ptr + high_at).to(tl.float32)[None, :]
    else:
        low -= 8.0
        high -= 8.0
    low *= tl.load(scales_ptr + low_at).to(tl.float32)[None, :]
    high *= tl.load(scales_ptr + high_at).to(tl.float32)[None, :]
    return low, high


@triton.jit(do_not_specialize=["M", "chunks_per_split"])
def _int4_matmul(
    a_ptr,
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    a_stride: tl.int64,
    chunks_per_split,
    GROUP: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
):
    tile_m, tile_n = tile_of_program(tl.program_id(0), tl.cdiv(M, TILE_M), tl.cdiv(N, TILE_N), 8)
    split = tl.program_id(1)
    m = tile_m * TILE_M + tl.arange(0, TILE_M)
    n = tile_n * TILE_N + tl.arange(0, TILE_N)
    safe_n = tl.minimum(n, N - 1)  # rows past the end are not stored
    half = tl.arange(0, 32)
    begin = split * chunks_per_split
    a_at = a_ptr + tl.minimum(m, M - 1).to(tl.int64)[:, None] * a_stride + begin * 64 + half[None, :]
    packed_at = packed_ptr + (begin * N + safe_n).to(tl.int64)[None, :] * 32 + half[:, None]  # [32, TILE_N]
    acc = tl.zeros([TILE_M, TILE_N], tl.float32)
    for chunk in range(begin, tl.minimum(begin + chunks_per_split, K // 64)):
        low_at = chunk * 64 // GROUP * N + safe_n
        high_at = (chunk * 64 + 32) // GROUP * N + safe_n
        low, high = int4_halves(tl.load(packed_at), scales_ptr, zeros_ptr, low_at, high_at)
        a = tl.load(a_at)
        acc = tl.dot(a, low.to(a.dtype), acc, input_precision="ieee")
        a = tl.load(a_at + 32)
        acc = tl.dot(a, high.to(a.dtype), acc, input_precision="ieee")
        a_at += 64
        packed_at += N.to(tl.int64) * 32
    store_tile(acc, out_ptr, bias_ptr, split, m, n, M, N)


def int4_matmul(a: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    """See the package's contract. Rows of a may be strided."""
    chip = hardware(a.device)
    rows, k = a.shape
    chunks, columns = weight.packed.shape[:2]
    assert chunks * INT4_CHUNK == k, "the weight has as many inputs as a has columns"
    if rows <= 16:
        tiles = MatrixTiles(16, 64, INT4_CHUNK, 2 if chip.amd else 4, 2 if chip.amd else 6)
    else:
        tiles = MatrixTiles(64, 128, INT4_CHUNK, 4, 2 if chip.amd else 4)
    tiles_m, tiles_n = triton.cdiv(rows, tiles.m), triton.cdiv(columns, tiles.n)
    splits = num_splits(chip, tiles_m * tiles_n, chunks) if tiles_m == 1 else 1
    out = torch.empty((rows, columns), dtype=a.dtype, device=a.device)
    parts = parts_for(splits, out)
    kernel: Any = _int4_matmul
    kernel[(tiles_m * tiles_n, splits)](
        a,
        weight.packed,
        weight.scales,
        weight.zeros,
        bias if splits == 1 else None,
        parts,
        rows,
        columns,
        k,
        a.stride(0),
        triton.cdiv(chunks, splits),
        GROUP=weight.group,
        TILE_M=tiles.m,
        TILE_N=tiles.n,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    reduce_splits(parts, bias, out)
    return out
