"""Mixture of experts in plain torch."""

import torch
from torch import Tensor

from quire_kernels.moe import Alignment, Routing, aligned_rows
from quire_kernels.quantized_matmul import Int4Weight
from quire_kernels.quantized_matmul.reference import dequantize, dequantize_int4


def route(logits: Tensor, routing: Routing, held: range) -> tuple[Tensor, Tensor]:
    """See the package's contract."""
    wide = logits.float()
    scores = wide.softmax(-1) if routing.score == "softmax" else wide.sigmoid()
    choice = scores if routing.correction_bias is None else scores + routing.correction_bias
    if routing.groups > 1:
        grouped = choice.unflatten(-1, (routing.groups, -1))
        best = grouped.amax(-1) if routing.group_score == "max" else grouped.topk(2, -1).values.sum(-1)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(routing.top_groups).indices, True)
        choice = choice.masked_fill(~kept.repeat_interleave(grouped.shape[-1], 1), float("-inf"))
    experts = choice.sort(dim=-1, descending=True, stable=True).indices[:, : routing.top_k]
    weights = scores.gather(1, experts)
    if routing.renormalize:
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-20)
    elsewhere = (experts < held.start) | (experts >= held.stop)
    local = torch.where(elsewhere, len(held), experts - held.start)
    return (weights * routing.scale).masked_fill(elsewhere, 0.0), local.to(torch.int32)


def align(experts: Tensor, num_experts: int, tile: int) -> Alignment:
    """See the package's contract."""
    flat = experts.flatten().long()
    rows = aligned_rows(flat.numel(), num_experts, tile)
    pairs = torch.full((rows,), flat.numel(), dtype=torch.int32, device=experts.device)
    tile_experts = torch.full((rows // tile,), -1, dtype=torch.int32, device=experts.device)
    at = 0
    for expert in range(num_experts):
        mine = (flat == expert).nonzero()[:, 0]
        pairs[at : at + mine.numel()] = mine.int()
        tiles = -(-mine.numel() // tile)
        tile_experts[at // tile : at // tile + tiles] = expert
        at += tiles * tile
    return Alignment(pairs, tile_experts, tile, flat.numel())


_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def dequantize_mxfp4(packed: Tensor, exponents: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """packed [..., K / 2] and exponents [..., K / 32], both uint8 → [..., K]."""
    values = torch.tensor(_E2M1, dtype=dtype, device=packed.device)
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).unflatten(-1, (-1, 32))
    return torch.ldexp(values[codes.int()], exponents.int()[..., None] - 127).flatten(-2)


def grouped_matmul(
    a: Tensor,
    w: Tensor | Int4Weight,
    experts: Tensor,
    pairs_per_row: int,
    dtype: torch.dtype,
    a_scale: Tensor | None = None,
    w_scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """experts [T, k] in place of an alignment; bias [E, N]."""
    wide = a.float() if a_scale is None else dequantize(a, a_scale)
    rows = wide.repeat_interleave(pairs_per_row, 0)
    flat = experts.flatten().long()
    outputs = w.packed.shape[2] if isinstance(w, Int4Weight) else w.shape[1]
    out = torch.empty(flat.numel(), outputs, device=a.device)
    for expert in flat.unique().tolist():
        mine = flat == expert
        scale = None if w_scale is None else w_scale[expert : expert + 1] if w_scale.ndim == 1 else w_scale[expert]
        if isinstance(w, Int4Weight):
            zeros = None if w.zeros is None else w.zeros[expert]
            weight = dequantize_int4(Int4Weight(w.packed[expert], w.scales[expert], zeros, w.group))
        elif scale is None:
            weight = w[expert].float()
        else:
            weight = (dequantize_mxfp4 if w.dtype == torch.uint8 else dequantize)(w[expert], scale)
        out[mine] = rows[mine] @ weight.T + (0.0 if bias is None else bias[expert].float())
    return out.to(dtype)


def combine(x: Tensor, weights: Tensor) -> Tensor:
    """See the package's contract."""
    parts = x.float().unflatten(0, weights.shape) * weights[..., None]
    return parts.masked_fill(weights[..., None] == 0, 0.0).sum(1).to(x.dtype)
