"""A kernel at a real shape: how to run it, what it should give, what it costs at least, and who else can do it.

The same cases are compiled ahead of time for chips that are not here (on "meta" tensors, `compile_ahead.py`) and run
and timed where there is a GPU (`make gpu-check`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Built:
    """A case with its inputs on a device."""

    run: Callable[[], Any]  # → a tensor, several, or Quantized
    expected: Callable[[], Any]  # the same from the reference, in higher precision
    bytes: float = 0.0  # that must move to or from memory at least
    operations: float = 0.0  # of the matrix units, at least
    terms: float = 1.0  # the size of the terms that are summed up: see tests/kernels/tolerance.py
    peers: dict[str, Callable[[], Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Case:
    """`build(device, fp8)` makes the inputs; fp8 is the chip's type."""

    name: str
    build: Callable[[torch.device, torch.dtype], Built]
    needs_fp8: bool = False
    streams: bool = False  # its time is the reading of memory: loads should be 16 bytes wide
    timed: bool = True


def normal(device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    """Random values; fp8 by way of bf16."""
    if dtype.itemsize == 1:
        return (torch.randn(shape, device=device, dtype=torch.bfloat16) * scale).to(dtype)
    return torch.randn(shape, device=device, dtype=dtype) * scale


def size(*tensors: Tensor | None) -> float:
    """Bytes of all."""
    return float(sum(t.numel() * t.element_size() for t in tensors if t is not None))
