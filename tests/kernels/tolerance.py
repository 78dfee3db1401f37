"""How far a kernel may be from its reference, the reference being computed in fp32 (or wider) from the same inputs.

One rounding of the result costs half a unit in the last place: 2^-8 of the value in bf16, 2^-11 in fp16. In e4m3 a
last bit of difference before the rounding can tell neighbours apart, which lie 2^-3 from each other. The absolute
part covers sums of cancelling terms of about 1, whose inner factors were rounded.
"""

import torch
import triton

FP8 = [torch.float8_e4m3fn]
if not triton.__version__.startswith("3.6"):  # whose interpreter does not know AMD's
    FP8.append(torch.float8_e4m3fnuz)
TOLERANCE = {  # dtype of the result → (relative, absolute)
    torch.float32: (1e-5, 2e-5),
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (8e-3, 1.6e-2),
    torch.float8_e4m3fn: (0.125, 2**-9),
    torch.float8_e4m3fnuz: (0.125, 2**-9),
}


def assert_close(got: torch.Tensor, expected: torch.Tensor, scale: float = 1.0) -> None:
    """`scale`: the size of the terms that were summed up, where it is not about 1."""
    assert got.shape == expected.shape
    relative, absolute = TOLERANCE[got.dtype]
    torch.testing.assert_close(got.float(), expected.float(), rtol=relative, atol=absolute * scale)
