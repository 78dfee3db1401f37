"""Low-rank adapters in Triton: shrink to the rank, split over K so that few tokens fill the chip, and expand."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels.hardware import hardware
from quire_kernels.matmul.triton import num_splits
from quire_kernels.moe import Alignment


@triton.jit(do_not_specialize=["num_tokens"])
def _shrink(
    x_ptr, a_ptr, parts_ptr, tokens_ptr, tile_adapters_ptr, num_tokens, K, x_stride: tl.int64, k_per_split,
    R: tl.constexpr, R_PADDED: tl.constexpr, TILE_M: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """x a^T → parts [splits, T, R] fp32."""
    tile, split = tl.program_id(0), tl.program_id(1)
    adapter = tl.load(tile_adapters_ptr + tile).to(tl.int64)
    if adapter < 0:
        return
    token = tl.load(tokens_ptr + tile * TILE_M + tl.arange(0, TILE_M))
    safe = tl.minimum(token, num_tokens - 1).to(tl.int64)
    rank = tl.arange(0, R_PADDED)
    acc = tl.zeros([TILE_M, R_PADDED], tl.float32)
    begin = split * k_per_split
    for start in range(begin, tl.minimum(begin + k_per_split, K), TILE_K):
        k = start + tl.arange(0, TILE_K)
        x = tl.load(x_ptr + safe[:, None] * x_stride + k[None, :], mask=(k < K)[None, :], other=0.0)
        at = (adapter * R + rank)[:, None] * K + k[None, :]
        a = tl.load(a_ptr + at, mask=(rank < R)[:, None] & (k < K)[None, :], other=0.0)
        acc = tl.dot(x, a.T, acc, input_precision="ieee")
    at = (split * num_tokens + token).to(tl.int64)[:, None] * R + rank[None, :]
    tl.store(parts_ptr + at, acc, mask=(token < num_tokens)[:, None] & (rank < R)[None, :])


@triton.jit(do_not_specialize=["num_tokens", "splits"])
def _expand(
    parts_ptr, b_ptr, out_ptr, tokens_ptr, tile_adapters_ptr, num_tokens, splits, N, offset,
    out_stride: tl.int64, R: tl.constexpr, R_PADDED: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """out += (sum of the parts) b^T."""
    tile = tl.program_id(0)
    adapter = tl.load(tile_adapters_ptr + tile).to(tl.int64)
    if adapter < 0:
        return
    token = tl.load(tokens_ptr + tile * TILE_M + tl.arange(0, TILE_M))
    alive = token < num_tokens
    rank = tl.arange(0, R_PADDED)
    inside = alive[:, None] & (rank < R)[None, :]
    small = tl.zeros([TILE_M, R_PADDED], tl.float32)
    for split in range(splits):
        at = (split * num_tokens + token).to(tl.int64)[:, None] * R + rank[None, :]
        small += tl.load(parts_ptr + at, mask=inside, other=0.0)
    n = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    at = (adapter * N + n)[:, None] * R + rank[None, :]
    b = tl.load(b_ptr + at, mask=(n < N)[:, None] & (rank < R)[None, :], other=0.0)
    delta = tl.dot(small.to(b.dtype), b.T, input_precision="ieee")
    at = out_ptr + token.to(tl.int64)[:, None] * out_stride + offset + n[None, :]
    inside = alive[:, None] & (n < N)[None, :]
    old = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, (old + delta).to(out_ptr.dtype.element_ty), mask=inside)


def add_lora(out: Tensor, x: Tensor, a: Tensor, b: Tensor, alignment: Alignment, offset: int = 0) -> None:
    """See the package's contract. Rows of out and x may be strided."""
    chip = hardware(x.device)
    tokens, k = x.shape
    rank, columns = a.shape[1], b.shape[1]
    tiles, padded = alignment.tile_experts.shape[0], max(16, triton.next_power_of_2(rank))
    steps = triton.cdiv(k, 128)
    splits = num_splits(chip, tiles, steps)
    parts = torch.empty((splits, tokens, rank), dtype=torch.float32, device=x.device)
    kernel: Any = _shrink
    kernel[(tiles, splits)](
        x, a, parts, alignment.pairs, alignment.tile_experts, tokens, k, x.stride(0),
        triton.cdiv(steps, splits) * 128,
        R=rank, R_PADDED=padded, TILE_M=alignment.tile, TILE_K=128 if x.element_size() == 2 else 32, num_warps=4,
        num_stages=2 if chip.amd else 4,
    )  # fmt: skip
    kernel = _expand
    kernel[(tiles, triton.cdiv(columns, 128))](
        parts, b, out, alignment.pairs, alignment.tile_experts, tokens, splits, columns, offset,
        out.stride(0), R=rank, R_PADDED=padded, TILE_M=alignment.tile, TILE_N=128, num_warps=4, num_stages=1,
    )  # fmt: skip
