"""Scaled fp8 products by torch (CUTLASS, cuBLASLt), for many rows on the chips where it has them."""

import torch
from torch import Tensor

from quire_kernels.hardware import Hardware

# More than our tile of 64 takes: where the library is expected to win. Not measured.
_FEWEST_ROWS = {"sm_89": 65, "sm_90": 65, "sm_100": 65}


def fewest_rows(chip: Hardware, w: Tensor, w_scale: Tensor, dtype: torch.dtype) -> int | None:
    """From how many rows on `library_matmul` is to be used for a weight; None: never.

    Blocks of scales are not torch's everywhere, nor are results in fp16; sizes are multiples of 16.
    """
    fits = w.dtype == torch.float8_e4m3fn and w_scale.ndim == 1 and dtype == torch.bfloat16
    return _FEWEST_ROWS.get(chip.target) if fits and all(size % 16 == 0 for size in w.shape) else None


def library_matmul(
    a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """See the package's contract; without blocks. A scale for the whole of a tensor is given to each of its rows."""
    by_row = a_scale.expand(a.shape[0])[:, None].contiguous()
    by_column = w_scale.expand(w.shape[0])[None, :].contiguous()
    return torch._scaled_mm(a, w.t(), by_row, by_column, bias, out_dtype=dtype)
