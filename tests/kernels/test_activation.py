"""Activations in Triton against their reference, and the reference against transformers'."""

import pytest
import torch
from quire_kernels.activation import Activation, reference
from quire_kernels.activation.triton import activate
from quire_kernels.quantize import Quantized, QuantizedOutput, Scales
from tolerance import FP8, assert_close
from transformers.activations import ACT2FN

CASES = [(kind, gated) for kind in Activation for gated in (False, True) if gated or kind != Activation.SWIGLU_CLAMPED]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "gated"), CASES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 63), (63, 1000), (5, 1600)])
def test_activate(tokens: int, width: int, kind: Activation, gated: bool, dtype: torch.dtype) -> None:
    x = (torch.randn(tokens, width * (2 if gated else 1) + 8) * 6).to(dtype)[:, :-8]
    assert_close(activate(x, kind, gated), reference.activate(x, kind, gated), 6.0)


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("scales", list(Scales))
@pytest.mark.parametrize(("kind", "gated"), [(Activation.SILU, True), (Activation.IDENTITY, False)])
@pytest.mark.parametrize(("tokens", "width"), [(1, 128), (63, 1152)])
def test_fp8_result(tokens: int, width: int, kind: Activation, gated: bool, scales: Scales, dtype: torch.dtype) -> None:
    output = QuantizedOutput(scales, dtype, torch.tensor([0.05]) if scales is Scales.TENSOR else None)
    x = (torch.randn(tokens, width * (2 if gated else 1)) * 3).bfloat16()
    got, expected = activate(x, kind, gated, output), reference.activate(x, kind, gated, output)
    assert isinstance(got, Quantized)
    assert isinstance(expected, Quantized)
    torch.testing.assert_close(got.scale, expected.scale, rtol=1e-5, atol=0)
    assert_close(got.values, expected.values)


@pytest.mark.parametrize("kind", [Activation.SILU, Activation.IDENTITY])
def test_int8_result(kind: Activation) -> None:
    """The nearest integers: at most one apart where a value lies between two."""
    output = QuantizedOutput(Scales.TOKEN, torch.int8)
    x = (torch.randn(9, 700 * (2 if kind is Activation.SILU else 1)) * 3).bfloat16()
    gated = kind is Activation.SILU
    got, expected = activate(x, kind, gated, output), reference.activate(x, kind, gated, output)
    assert isinstance(got, Quantized)
    assert isinstance(expected, Quantized)
    assert expected.values.abs().amax(1).tolist() == [127] * 9
    torch.testing.assert_close(got.scale, expected.scale, rtol=1e-5, atol=0)
    apart = (got.values.int() - expected.values.int()).abs()
    assert apart.max() <= 1
    assert apart.float().mean() < 1e-3
    plain = reference.activate(x, kind, gated)
    assert isinstance(plain, torch.Tensor)
    error = (expected.values.float() * expected.scale[:, None] - plain.float()).abs()
    assert (error <= expected.scale[:, None] * 0.51 + 0.02 * plain.float().abs()).all()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (Activation.SILU, "silu"),
        (Activation.GELU, "gelu"),
        (Activation.GELU_TANH, "gelu_pytorch_tanh"),
        (Activation.RELU_SQUARED, "relu2"),
        (Activation.SIGMOID, "sigmoid"),
    ],
)
def test_the_reference_is_transformers(kind: Activation, name: str) -> None:
    x = torch.randn(9, 30) * 3
    assert_close(reference.activate(x, kind, False), ACT2FN[name](x))
    assert_close(reference.activate(x, kind, True), ACT2FN[name](x[:, :15]) * x[:, 15:])


def test_clamped_swiglu_is_gpt_oss() -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    gate, up = torch.randn(9, 15) * 9, torch.randn(9, 15) * 9
    experts = GptOssExperts.__new__(GptOssExperts)
    torch.nn.Module.__init__(experts)
    experts.alpha, experts.limit = 1.702, 7.0
    expected = experts._apply_gate(torch.stack((gate, up), -1).flatten(1))
    assert_close(reference.activate(torch.cat((gate, up), 1), Activation.SWIGLU_CLAMPED, True), expected)
