"""Matrix multiplication in Triton, batch-invariant; and what all matrix kernels share."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels.hardware import Hardware, hardware


@dataclass(frozen=True, slots=True)
class MatrixTiles:
    """How a product is cut: rows of a, rows of w, and the K that one step of the loop takes."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def fits(self, chip: Hardware, a_bytes: int, w_bytes: int) -> "MatrixTiles":
        """With no more stages than the shared memory holds."""
        stage = self.k * (self.m * a_bytes + self.n * w_bytes)
        return MatrixTiles(
            self.m, self.n, self.k, self.warps, max(1, min(self.stages, (chip.shared_bytes - 4096) // stage))
        )


def num_splits(chip: Hardware, tiles: int, steps: int) -> int:
    """Into how many parts K is cut so that about two programs run on every multiprocessor; a part has 4 steps or
    more."""
    wanted = min(2 * chip.multiprocessors // tiles, steps // 4, 32)
    return 1 << (max(1, wanted).bit_length() - 1)


@triton.jit
def tile_of_program(program, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Walks the tiles in groups of GROUP rows of tiles, so that programs side by side share them in the L2 cache."""
    per_group = GROUP * tiles_n
    first = program // per_group * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    inside = program % per_group
    return first + inside % size, inside // size


@triton.jit
def store_tile(acc, out_ptr, bias_ptr, split, m, n, M, N):
    """acc [tile m, tile n] fp32 → out [M, N], or parts [splits, M, N], which come without a bias."""
    inside = (m < M)[:, None] & (n < N)[None, :]
    at = (split * M + m).to(tl.int64)[:, None] * N + n[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _reduce_splits(parts_ptr, bias_ptr, out_ptr, rows, width, SPLITS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    total = tl.zeros([COLUMNS], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts_ptr + (split * rows + row) * width + columns, mask=inside, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + columns, total.to(out_ptr.dtype.element_ty), mask=inside)


def parts_for(splits: int, out: Tensor) -> Tensor:
    """Where the splits of a product go: `out` [M, N] itself where there is one, else fp32 [splits, M, N]."""
    if splits == 1:
        return out
    return torch.empty((splits, *out.shape), dtype=torch.float32, device=out.device)


def reduce_splits(parts: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """parts [S, M, N] + bias [N] → out [M, N], always in the same order; nothing to do where there is one split."""
    if parts is out:
        return
    rows, width = out.shape
    kernel: Any = _reduce_splits
    kernel[(rows, triton.cdiv(width, 512))](
        parts, bias, out, rows, width, SPLITS=parts.shape[0], COLUMNS=512, num_warps=2, num_stages=1
    )


@triton.jit(do_not_specialize=["M"])
def _matmul(
    a_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    a_stride: tl.int64,
    w_stride: tl.int64,
    k_per_split,
    EVEN_K: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    tile_m, tile_n = tile_of_program(tl.program_id(0), tl.cdiv(M, TILE_M), tl.cdiv(N, TILE_N), 8)
    split = tl.program_id(1)
    m = tile_m * TILE_M + tl.arange(0, TILE_M)
    n = tile_n * TILE_N + tl.arange(0, TILE_N)
    begin = split * k_per_split
    k = begin + tl.arange(0, TILE_K)
    # Rows past the end are the last one again: no mask in the loop, and what they give is not stored.
    a_at = a_ptr + tl.minimum(m, M - 1).to(tl.int64)[:, None] * a_stride + k[None, :]
    w_at = w_ptr + tl.minimum(n, N - 1).to(tl.int64)[:, None] * w_stride + k[None, :]
    acc = tl.zeros([TILE_M, TILE_N], tl.float32)
    for step in range(0, k_per_split, TILE_K):
        if EVEN_K:
            a = tl.load(a_at)
            w = tl.load(w_at)
        else:
            present = (k < K - step)[None, :]
            a = tl.load(a_at, mask=present, other=0.0)
            w = tl.load(w_at, mask=present, other=0.0)
        acc = tl.dot(a, w.T, acc, input_precision="ieee")
        a_at += TILE_K
        w_at += TILE_K
    store_tile(acc, out_ptr, bias_ptr, split, m, n, M, N)


def matmul(a: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """See the package's contract. Rows of a and w may be strided."""
    chip = hardware(a.device)
    (rows, k), columns = a.shape, w.shape[0]
    wide = a.element_size() == 4
    tiles = (
        MatrixTiles(64, 64, 32, 4, 3) if wide else MatrixTiles(128, 128, 64, 4 if chip.amd else 8, 2 if chip.amd else 4)
    )
    tiles = tiles.fits(chip, a.element_size(), w.element_size())
    tiles_n = triton.cdiv(columns, tiles.n)
    steps = triton.cdiv(k, tiles.k)
    splits = num_splits(chip, 2 * tiles_n, steps)  # one program a multiprocessor for a few rows, few parts for many
    out = torch.empty((rows, columns), dtype=a.dtype, device=a.device)
    parts = parts_for(splits, out)
    per_split = triton.cdiv(steps, splits) * tiles.k
    kernel: Any = _matmul
    kernel[(triton.cdiv(rows, tiles.m) * tiles_n, splits)](
        a,
        w,
        bias if splits == 1 else None,
        parts,
        rows,
        columns,
        k,
        a.stride(0),
        w.stride(0),
        per_split,
        EVEN_K=k == per_split * splits,
        TILE_M=tiles.m,
        TILE_N=tiles.n,
        TILE_K=tiles.k,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    reduce_splits(parts, bias, out)
    return out
