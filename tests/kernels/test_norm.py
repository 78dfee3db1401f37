"""Norms in Triton against their reference, and the reference against torch's own norms."""

import pytest
import torch
import torch.nn.functional as F
from quire_kernels.norm import Norm, reference
from quire_kernels.norm.triton import add_norm, norm_heads
from quire_kernels.quantize import Quantized, QuantizedOutput, Scales
from quire_kernels.quantize.reference import dequantize
from tolerance import FP8, assert_close

NORMS = [(Norm(1e-5), False), (Norm(1e-6, unit_offset=True), False), (Norm(1e-5, "layer"), False)]
NORMS.append((Norm(1e-5, "layer", unit_offset=True), True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("norm", "bias"), NORMS)
@pytest.mark.parametrize(("tokens", "width"), [(1, 63), (63, 1000), (1000, 64)])
def test_add_norm(tokens: int, width: int, norm: Norm, bias: bool, dtype: torch.dtype) -> None:
    weight, shift = torch.randn(width).to(dtype), torch.randn(width).to(dtype) if bias else None
    residual = (torch.randn(tokens, width + 9) + 1).to(dtype)[:, :width]  # strided
    for delta in (torch.randn(tokens, width).to(dtype), None):
        mine, theirs = residual.clone(), residual.clone()
        expected = reference.add_norm(theirs, delta, weight, shift, norm)
        got = add_norm(mine, delta, weight, shift, norm)
        assert torch.equal(mine, theirs)
        assert_close(got, expected)


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("scales", list(Scales))
@pytest.mark.parametrize(("tokens", "width"), [(1, 128), (7, 384), (3, 2048)])
def test_fp8_result(tokens: int, width: int, scales: Scales, dtype: torch.dtype) -> None:
    output = QuantizedOutput(scales, dtype, torch.tensor([0.02]) if scales is Scales.TENSOR else None)
    residual, weight = torch.randn(tokens, width).bfloat16(), torch.randn(width).bfloat16()
    residual[-1] = 0  # a row of zeros has a scale too
    expected = reference.add_norm(residual.clone(), None, weight, None, Norm(1e-5), output)
    got = add_norm(residual.clone(), None, weight, None, Norm(1e-5), output)
    assert isinstance(got, Quantized)
    assert isinstance(expected, Quantized)
    torch.testing.assert_close(got.scale, expected.scale, rtol=1e-5, atol=0)
    assert_close(got.values, expected.values)
    exact = reference.normalize(residual, weight, None, Norm(1e-5))
    largest = 240 if dtype == torch.float8_e4m3fnuz else 448
    clipped = exact.clamp(-0.02 * largest, 0.02 * largest) if scales is Scales.TENSOR else exact
    torch.testing.assert_close(dequantize(got), clipped, rtol=0.07, atol=0.01)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("norm", [Norm(1e-6), Norm(1e-6, "layer")])
def test_norm_heads(norm: Norm, per_head: bool) -> None:
    qkv = torch.randn(63, 9, 80)
    weight = torch.randn(5, 80) if per_head else torch.randn(80)
    expected, got = qkv.clone(), qkv.clone()
    reference.norm_heads(expected[:, 2:7], weight, None, norm)
    norm_heads(got[:, 2:7], weight, None, norm)
    assert_close(got, expected)
    assert torch.equal(got[:, :2], qkv[:, :2])
    assert torch.equal(got[:, 7:], qkv[:, 7:])


def test_the_reference_is_torch() -> None:
    x, weight, bias = torch.randn(5, 48), torch.randn(48), torch.randn(48)
    assert_close(reference.normalize(x, weight, None, Norm(1e-5)), F.rms_norm(x, (48,), weight, 1e-5))
    assert_close(reference.normalize(x, weight, bias, Norm(1e-5, "layer")), F.layer_norm(x, (48,), weight, bias, 1e-5))


def test_a_row_depends_on_nothing_but_the_row() -> None:
    x, weight = torch.randn(70, 1000).bfloat16(), torch.randn(1000).bfloat16()
    whole = add_norm(x.clone(), None, weight, None, Norm(1e-5))
    for begin, end in ((0, 1), (13, 50), (69, 70)):
        assert torch.equal(add_norm(x[begin:end].clone(), None, weight, None, Norm(1e-5)), whole[begin:end])
