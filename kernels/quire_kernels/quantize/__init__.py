"""fp8 and int8 results of other operations: what is asked for, and what comes back.

A value v is stored as e4m3(v / scale), or as the nearest int8, clamped to the largest number, where the scale is given
(one for the tensor) or is max |v| / that number over a row or over 128 columns of a row. e4m3 is `float8_e4m3fn`, but
`float8_e4m3fnuz` on gfx942.
"""

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

BLOCK_COLUMNS = 128  # of a blockwise scale (DeepSeek-V3)


class Scales(IntEnum):
    """What shares a scale."""

    TENSOR = 1  # given: [1] fp32
    TOKEN = 2  # found: [T] fp32
    BLOCK = 3  # found: [T, N / 128] fp32


@dataclass(frozen=True, slots=True)
class QuantizedOutput:
    """Asks an operation for a result in fp8 or int8."""

    scales: Scales
    dtype: torch.dtype
    scale: Tensor | None = None  # [1] fp32 with Scales.TENSOR

    @property
    def limit(self) -> float:
        """The largest number."""
        return 127.0 if self.dtype == torch.int8 else torch.finfo(self.dtype).max

    def empty(self, rows: int, columns: int, device: torch.device) -> "Quantized":
        """Where the result goes. Raises ValueError for columns that no whole number of blocks covers."""
        if self.scales is Scales.BLOCK and columns % BLOCK_COLUMNS:
            raise ValueError(f"{columns} columns are not a multiple of {BLOCK_COLUMNS}: use another scheme")
        shape = {Scales.TENSOR: (1,), Scales.TOKEN: (rows,), Scales.BLOCK: (rows, columns // BLOCK_COLUMNS)}
        if self.scales is Scales.TENSOR:
            assert self.scale is not None, "a scale per tensor is given"
            scale = self.scale
        else:
            scale = torch.empty(shape[self.scales], dtype=torch.float32, device=device)
        return Quantized(torch.empty((rows, columns), dtype=self.dtype, device=device), scale)


@dataclass(frozen=True, slots=True)
class Quantized:
    """values [T, N] times scale ([1], [T] or [T, N / 128]) is what was meant."""

    values: Tensor
    scale: Tensor
