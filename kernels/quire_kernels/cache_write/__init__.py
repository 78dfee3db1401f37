"""Rotary embedding (Su et al. 2021), optional per-head RMSNorm, and the write of keys and values to their pages.

Contract: `qkv` [T, (H + 2K) * D] holds the new tokens' queries, keys and values. q is normalized and rotated in place;
k likewise and v go to slot `slots[t]` = page * block size + offset of the caches [P, K, B, D], or nowhere where it is
negative; the places of k and v in `qkv` are undefined afterwards. All is computed in fp32 and rounded once. fp8 caches
store e4m3(v / scale) with a scale per head.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """How positions turn the first 2 * half dimensions of a head; the rest stays."""

    cos_sin: Tensor  # [positions, 2, half] fp32
    interleaved: bool = False  # pairs are neighbours (GPT-J), not one half's with the other's (GPT-NeoX)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadNorm:
    """RMSNorm of every query and key head, before it turns (Qwen3, Gemma 3) or after (Hunyuan)."""

    q_weight: Tensor  # [D]
    k_weight: Tensor  # [D]
    eps: float
    unit_offset: bool = False  # the factor is 1 + weight
    after_rope: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheScales:
    """Of fp8 caches: stored = value / scale."""

    key: Tensor  # [K] fp32
    value: Tensor  # [K] fp32
