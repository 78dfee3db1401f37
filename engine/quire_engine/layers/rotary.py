"""Rotary position embedding (Su et al. 2021): the table of cosines and sines for every position."""

import math
from dataclasses import replace

import torch
from quire_kernels.backends import AttentionBatch
from quire_kernels.cache_write import Rope
from torch import Tensor

from quire_engine.spec import Rotary


def cos_sin_table(rotary: Rotary, max_position: int) -> Tensor:
    """[max_position, 2, dim / 2] in fp32, for a context of `max_position` tokens.

    Scalings: linear (positions divided), llama3 (Llama 3.1's report), yarn (Peng et al. 2023), longrope (Ding et al.
    2024; the factors for long contexts where the context exceeds the original one). dynamic changes nothing within the
    model's context, beyond which nothing is served.
    """
    exponents = torch.arange(0, rotary.dim, 2, dtype=torch.int64).float() / rotary.dim
    frequencies = 1.0 / (rotary.theta**exponents)
    magnitude = 1.0
    if rotary.kind == "linear":
        frequencies = frequencies / rotary.scaling["factor"]
    elif rotary.kind == "llama3":
        frequencies = _llama3(frequencies, rotary)
    elif rotary.kind == "yarn":
        frequencies, magnitude = _yarn(frequencies, rotary)
    elif rotary.kind == "longrope":
        frequencies, magnitude = _longrope(frequencies, rotary, max_position)
    angles = torch.arange(max_position, dtype=torch.float32)[:, None] * frequencies
    return torch.stack((angles.cos() * magnitude, angles.sin() * magnitude), 1)


def axes_of(rotary: Rotary) -> Tensor:
    """[dim / 2]: which of a token's three positions (time, row, column) each frequency reads."""
    half = rotary.dim // 2
    if not rotary.sections_interleaved:
        return torch.repeat_interleave(torch.arange(len(rotary.sections)), torch.tensor(rotary.sections))
    axes = torch.zeros(half, dtype=torch.int64)
    for axis, section in list(enumerate(rotary.sections))[1:]:
        axes[axis : 3 * section : 3] = axis
    return axes


class RotaryTable:
    """By which a layer turns its tokens."""

    def __init__(self, rotary: Rotary, max_position: int, device: torch.device) -> None:
        self.rope = Rope(cos_sin=cos_sin_table(rotary, max_position).to(device), interleaved=rotary.interleaved)
        self._axes = axes_of(rotary).to(device) if rotary.sections else None

    def of(self, batch: AttentionBatch) -> tuple[Rope, AttentionBatch]:
        """What layers read. Tokens with three positions each get rows of their own in a table for this step alone, so
        that no kernel knows of them."""
        if batch.angles is None or self._axes is None:
            return self.rope, batch
        rows = batch.angles.index_select(0, self._axes).T.long()  # [T, half]
        turned = self.rope.cos_sin.gather(0, rows[:, None].expand(-1, 2, -1))
        own = torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device)
        return replace(self.rope, cos_sin=turned), replace(batch, positions=own, angles=None)


def _llama3(frequencies: Tensor, rotary: Rotary) -> Tensor:
    scaling = rotary.scaling
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling.get("original_max_position_embeddings", rotary.max_position)
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled = torch.where(wavelengths > original / low, frequencies / factor, frequencies)
    middle = (wavelengths <= original / low) & (wavelengths >= original / high)
    return torch.where(middle, between, scaled)


def mscale(scale: float, m: float = 1.0) -> float:
    """YaRN's correction of the softmax's temperature."""
    return 0.1 * m * math.log(scale) + 1.0 if scale > 1 else 1.0


def _yarn(frequencies: Tensor, rotary: Rotary) -> tuple[Tensor, float]:
    scaling, dim = rotary.scaling, rotary.dim
    factor = scaling["factor"]
    original = scaling.get("original_max_position_embeddings") or rotary.max_position
    magnitude = scaling.get("attention_factor")
    if magnitude is None:
        m, m_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        magnitude = mscale(factor, m) / mscale(factor, m_all) if m and m_all else mscale(factor)

    def dimension(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rotary.theta))

    low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return frequencies / factor * ramp + frequencies * (1 - ramp), float(magnitude)


def _longrope(frequencies: Tensor, rotary: Rotary, max_position: int) -> tuple[Tensor, float]:
    scaling = rotary.scaling
    original = scaling["original_max_position_embeddings"]
    factors = scaling["long_factor" if max_position > original else "short_factor"]
    magnitude = scaling.get("attention_factor")
    if magnitude is None:
        factor = scaling.get("factor") or rotary.max_position / original
        magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return frequencies / torch.tensor(factors, dtype=torch.float32), float(magnitude)
