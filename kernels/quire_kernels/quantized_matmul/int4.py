"""From the layouts of AWQ, GPTQ and compressed-tensors checkpoints to `Int4Weight`."""

import torch
from torch import Tensor

from quire_kernels.quantized_matmul import GROUPS, INT4_CHUNK, Int4Weight

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble of a word that holds column i (AWQ's gemm version)
_NIBBLES = 4 * torch.arange(8)


def pack(values: Tensor) -> Tensor:
    """values [N, K] uint8 below 16 → [K / 64, N, 32]."""
    chunks = values.unflatten(1, (-1, 2, INT4_CHUNK // 2))  # [N, K / 64, half, 32]
    return (chunks[:, :, 0] | chunks[:, :, 1] << 4).transpose(0, 1).contiguous()


def unpack(packed: Tensor) -> Tensor:
    """[K / 64, N, 32] → values [N, K] uint8."""
    return torch.stack((packed & 15, packed >> 4), 2).permute(1, 0, 2, 3).flatten(1)


def _columns(words: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """[rows, N / 8] int32 → [rows, N] uint8, eight columns to a word."""
    nibbles = (words[..., None] >> _NIBBLES[list(order)].to(words.device)) & 15
    return nibbles.flatten(1).to(torch.uint8)


def _weight(values: Tensor, scales: Tensor, zeros: Tensor) -> Int4Weight:
    """values [K, N], scales and zeros [K / group, N]."""
    group = values.shape[0] // scales.shape[0]
    if group not in GROUPS:
        raise ValueError(f"int4 weights in groups of {group}; the kernels have {', '.join(map(str, GROUPS))}")
    if values.shape[0] % INT4_CHUNK:
        raise ValueError(f"an int4 weight with {values.shape[0]} inputs; the kernels take multiples of {INT4_CHUNK}")
    symmetric = zeros.device.type != "meta" and bool((zeros == 8).all())
    return Int4Weight(
        pack(values.T.contiguous()), scales.contiguous(), None if symmetric else zeros.contiguous(), group
    )


def from_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Int4Weight:
    """qweight [K, N / 8], qzeros [K / group, N / 8] int32, scales [K / group, N]."""
    return _weight(_columns(qweight, _AWQ_ORDER), scales, _columns(qzeros, _AWQ_ORDER))


def from_gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, zero_offset: int = 1
) -> Int4Weight:
    """qweight [K / 8, N], qzeros [K / group, N / 8] int32 (the zero less `zero_offset`), scales [K / group, N].

    Raises ValueError for weights in activation order (`desc_act`), whose groups are scattered.
    """
    values = _columns(qweight.T).T  # [K, N]
    group = values.shape[0] // scales.shape[0]
    if g_idx is not None and not torch.equal(g_idx.long(), torch.arange(values.shape[0], device=g_idx.device) // group):
        raise ValueError("a GPTQ weight in activation order (desc_act); requantize it with desc_act=false")
    return _weight(values, scales, _columns(qzeros) + zero_offset)


def from_compressed(packed: Tensor, scales: Tensor, zeros: Tensor | None) -> Int4Weight:
    """compressed-tensors' pack-quantized: packed [N, K / 8], zeros [N / 8, K / group] int32, scales [N, K / group]."""
    values = _columns(packed)  # [N, K]
    if zeros is None:
        wide = torch.full(scales.shape, 8, dtype=torch.uint8, device=scales.device)
    else:
        wide = _columns(zeros.T).T
    return _weight(values.T, scales.T, wide.T)


def concatenate(weights: list[Int4Weight]) -> Int4Weight:
    """One weight with the outputs of all."""
    if len(weights) == 1:
        return weights[0]
    zeros = None
    if any(weight.zeros is not None for weight in weights):
        eight = [torch.full(w.scales.shape, 8, dtype=torch.uint8, device=w.scales.device) for w in weights]
        zeros = torch.cat([e if w.zeros is None else w.zeros for w, e in zip(weights, eight, strict=True)], 1)
    return Int4Weight(
        torch.cat([weight.packed for weight in weights], 1),
        torch.cat([weight.scales for weight in weights], 1),
        zeros,
        weights[0].group,
    )
