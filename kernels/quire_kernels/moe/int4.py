"""Products with experts in 4-bit integers (AWQ, GPTQ), in Triton: `int4_matmul`'s tile for the rows of each expert."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels.hardware import hardware
from quire_kernels.matmul.triton import MatrixTiles
from quire_kernels.moe import Alignment
from quire_kernels.moe.triton import rows_of_tile, store_pairs
from quire_kernels.quantized_matmul import INT4_CHUNK, Int4Weight
from quire_kernels.quantized_matmul.triton import int4_halves


@triton.jit(do_not_specialize=["num_pairs", "tiles_m"])
def _grouped_int4(
    a_ptr,
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    out_ptr,
    pairs_ptr,
    tile_experts_ptr,
    num_pairs,
    tiles_m,
    N,
    K,
    a_stride: tl.int64,
    GROUP: tl.constexpr,
    PAIRS_PER_ROW: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
):
    expert, pair, row, n = rows_of_tile(
        pairs_ptr, tile_experts_ptr, num_pairs, tiles_m, N, PAIRS_PER_ROW, TILE_M, TILE_N
    )
    if expert < 0:
        return
    safe_n = tl.minimum(n, N - 1)
    half = tl.arange(0, 32)
    a_at = a_ptr + row.to(tl.int64)[:, None] * a_stride + half[None, :]
    packed_at = packed_ptr + (expert * (K // 64) * N + safe_n)[None, :] * 32 + half[:, None]  # [32, TILE_N]
    groups = expert * (K // GROUP) * N
    acc = tl.zeros([TILE_M, TILE_N], tl.float32)
    for chunk in range(K // 64):
        low_at = groups + chunk * 64 // GROUP * N + safe_n
        high_at = groups + (chunk * 64 + 32) // GROUP * N + safe_n
        low, high = int4_halves(tl.load(packed_at), scales_ptr, zeros_ptr, low_at, high_at)
        acc = tl.dot(tl.load(a_at), low.to(a_ptr.dtype.element_ty), acc, input_precision="ieee")
        acc = tl.dot(tl.load(a_at + 32), high.to(a_ptr.dtype.element_ty), acc, input_precision="ieee")
        a_at += 64
        packed_at += N.to(tl.int64) * 32
    store_pairs(acc, out_ptr, bias_ptr, expert, pair, n, num_pairs, N)


def grouped_int4_matmul(
    a: Tensor, w: Int4Weight, alignment: Alignment, pairs_per_row: int, bias: Tensor | None = None
) -> Tensor:
    """See the package's contract; the result is in a's dtype. Rows of a may be strided."""
    chip = hardware(a.device)
    _, chunks, columns, _ = w.packed.shape
    k = chunks * INT4_CHUNK
    assert a.shape[1] == k, "the weights have as many inputs as a has columns"
    stages = 2 if chip.amd else 4
    tiles = MatrixTiles(alignment.tile, 64 if alignment.tile == 16 else 128, INT4_CHUNK, 4, stages)
    if alignment.tile == 128:
        tiles = MatrixTiles(128, 128, INT4_CHUNK, 8, stages)
    tiles_m = alignment.tile_experts.shape[0]
    out = torch.empty((alignment.num_pairs, columns), dtype=a.dtype, device=a.device)
    kernel: Any = _grouped_int4
    kernel[(tiles_m * triton.cdiv(columns, tiles.n),)](
        a,
        w.packed,
        w.scales,
        w.zeros,
        bias,
        out,
        alignment.pairs,
        alignment.tile_experts,
        alignment.num_pairs,
        tiles_m,
        columns,
        k,
        a.stride(0),
        GROUP=w.group,
        PAIRS_PER_ROW=pairs_per_row,
        TILE_M=tiles.m,
        TILE_N=tiles.n,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return out
