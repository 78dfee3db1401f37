"""The canary: where Triton's interpreter, mended, computes what the hardware does.

If a test fails after an upgrade of Triton, interpreter_shim.py must change; if all passes without it, it can go.
"""

import pytest
import torch
import triton
import triton.language as tl
from tolerance import FP8


@triton.jit
def _cast(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(out_ptr.dtype.element_ty))


@triton.jit
def _arithmetic(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    tl.store(out_ptr + at, tl.where(x > y, x * y + x, -y))


@triton.jit
def _dot(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


NARROW = [torch.bfloat16, torch.float16, *FP8, torch.float8_e5m2]


@pytest.mark.parametrize("narrow", NARROW)
def test_casts_round_to_nearest_even(narrow: torch.dtype) -> None:
    ties = torch.tensor([1.0 + 2**-8, 1.0 + 3 * 2**-8, 17.0, 19.0, 1.0 + 2**-4, 0.0, -0.0, 2**-7, 3e-4, -200.0])
    x = torch.cat((ties, torch.randn(246)))
    expected, got = x.to(narrow), torch.empty(256, dtype=narrow)
    _cast[(1,)](x, got, 256)
    assert torch.equal(got.float(), expected.float())
    back = torch.empty(256)
    _cast[(1,)](expected, back, 256)
    assert torch.equal(back, expected.float())


def test_bf16_arithmetic() -> None:
    x, y = torch.randn(64).bfloat16(), torch.randn(64).bfloat16()
    got = torch.empty(64, dtype=torch.bfloat16)
    _arithmetic[(1,)](x, y, got, 64)
    assert torch.equal(got, torch.where(x > y, x * y + x, -y))


@pytest.mark.parametrize("narrow", NARROW)
def test_dot(narrow: torch.dtype) -> None:
    a, b = torch.randn(32, 32).to(narrow), torch.randn(32, 32).to(narrow)
    got = torch.empty(32, 32)
    _dot[(1,)](a, b, got, 32)
    torch.testing.assert_close(got, a.float() @ b.float(), rtol=1e-5, atol=1e-5)
