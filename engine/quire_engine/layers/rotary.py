"""Rotary position embedding (Su et al. 2021): the table of cosines and sines for every position."""

import math
from typing import Any

import torch
from torch import Tensor

from quire_engine.errors import ModelError

KINDS = ("default", "linear", "llama3", "yarn")


def cos_sin_table(
    *,
    theta: float,
    rotary_dim: int,
    scaling: dict[str, Any] | None,
    max_position: int,
    model_max_position: int,
) -> Tensor:
    """[max_position, 2, rotary_dim / 2] in fp32. Raises ModelError for a scaling that is not known.

    Scalings: linear (positions divided), llama3 (Llama 3.1's report), yarn (Peng et al. 2023).
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
    frequencies = 1.0 / (theta**exponents)
    magnitude = 1.0
    scaling = scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "linear":
        frequencies = frequencies / scaling["factor"]
    elif kind == "llama3":
        frequencies = _llama3(frequencies, scaling, model_max_position)
    elif kind == "yarn":
        frequencies, magnitude = _yarn(frequencies, scaling, theta, rotary_dim, model_max_position)
    elif kind != "default":
        raise ModelError(f"rope_scaling has rope_type {kind!r}; known are {', '.join(KINDS)}")
    angles = torch.arange(max_position, dtype=torch.float32)[:, None] * frequencies
    return torch.stack((angles.cos() * magnitude, angles.sin() * magnitude), 1)


def _llama3(frequencies: Tensor, scaling: dict[str, Any], model_max_position: int) -> Tensor:
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling.get("original_max_position_embeddings", model_max_position)
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled = torch.where(wavelengths > original / low, frequencies / factor, frequencies)
    middle = (wavelengths <= original / low) & (wavelengths >= original / high)
    return torch.where(middle, between, scaled)


def _yarn(
    frequencies: Tensor, scaling: dict[str, Any], theta: float, dim: int, model_max_position: int
) -> tuple[Tensor, float]:
    factor = scaling["factor"]
    original = scaling.get("original_max_position_embeddings") or model_max_position

    def mscale(scale: float, m: float = 1.0) -> float:
        return 0.1 * m * math.log(scale) + 1.0 if scale > 1 else 1.0

    magnitude = scaling.get("attention_factor")
    if magnitude is None:
        m, m_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        magnitude = mscale(factor, m) / mscale(factor, m_all) if m and m_all else mscale(factor)

    def dimension(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return frequencies / factor * ramp + frequencies * (1 - ramp), float(magnitude)
