"""The Triton backend's layers against torch's, operation by operation as a decoder calls them."""

import pytest
import torch
from quire_kernels.activation import Activation
from quire_kernels.moe import Experts, Routing
from quire_kernels.quantize import QuantizedOutput, Scales
from quire_kernels.quantize.reference import quantize
from quire_kernels.quantized_matmul.int4 import from_compressed
from quire_kernels.torch_backend import TorchBackend
from quire_kernels.triton_backend import TritonBackend
from tolerance import assert_close

CPU = torch.device("cpu")
E4M3 = torch.float8_e4m3fn


def both() -> tuple[TritonBackend, TorchBackend]:
    return TritonBackend(CPU), TorchBackend()


def expert_weights(count: int, kind: str, first: int = 0, held: int | None = None) -> Experts:
    generator = torch.Generator().manual_seed(1)
    gate_up = torch.randn(count, 2 * 64, 128, generator=generator) * 0.1
    down = torch.randn(count, 128, 64, generator=generator) * 0.1
    part = slice(first, first + (held or count))
    gate_up, down = gate_up[part].contiguous(), down[part].contiguous()
    if kind == "plain":
        return Experts(gate_up=gate_up, down=down, first=first)
    narrow = [[quantize(w, QuantizedOutput(Scales.TOKEN, E4M3)) for w in weights] for weights in (gate_up, down)]
    values = [torch.stack([one.values.view(torch.uint8) for one in ones]).view(E4M3) for ones in narrow]
    scales = [torch.stack([one.scale for one in ones]) for ones in narrow]
    return Experts(
        gate_up=values[0],
        down=values[1],
        gate_up_scale=scales[0],
        down_scale=scales[1],
        inputs=QuantizedOutput(Scales.TOKEN, E4M3),
        first=first,
    )


@pytest.mark.parametrize("kind", ["plain", "fp8"])
def test_experts(kind: str) -> None:
    """All of them, and the sum of two halves, as two ranks hold them."""
    triton, plain = both()
    x, router = torch.randn(37, 128), torch.randn(37, 8)
    routing = Routing(top_k=3)
    whole = plain.experts(x, router, routing, expert_weights(8, kind))
    scale = 0.05 * float(whole.abs().max()) if kind == "fp8" else 1e-4
    torch.testing.assert_close(triton.experts(x, router, routing, expert_weights(8, kind)), whole, atol=scale, rtol=0)
    for backend in (triton, plain):
        halves = [backend.experts(x, router, routing, expert_weights(8, kind, first, 4)) for first in (0, 4)]
        torch.testing.assert_close(sum(halves), whole, atol=scale, rtol=0)


def test_no_expert_of_a_rank_is_chosen() -> None:
    triton, _ = both()
    router = torch.full((5, 8), -20.0)
    router[:, :2] = 20.0
    out = triton.experts(torch.randn(5, 128), router, Routing(top_k=2), expert_weights(8, "plain", 4, 4))
    assert torch.equal(out, torch.zeros(5, 128))


@pytest.mark.parametrize(("kind", "scales"), [(E4M3, Scales.TOKEN), (E4M3, Scales.BLOCK), (torch.int8, Scales.TOKEN)])
def test_scaled_linear(kind: torch.dtype, scales: Scales) -> None:
    triton, plain = both()
    output = QuantizedOutput(scales, kind)
    weight = quantize(torch.randn(256, 384), QuantizedOutput(Scales.TOKEN, kind))
    scale = torch.rand(2, 3) * 0.01 if scales is Scales.BLOCK else weight.scale
    bias = torch.randn(256)
    x = quantize(torch.randn(9, 384), output)
    ours, theirs = (backend.scaled_linear(weight.values, scale, bias, torch.float32)(x) for backend in (triton, plain))
    assert_close(ours, theirs, 20.0)


def test_int4_linear() -> None:
    triton, plain = both()
    packed = torch.randint(-(1 << 31), (1 << 31) - 1, (192, 16), dtype=torch.int32)
    zeros = torch.randint(-(1 << 31), (1 << 31) - 1, (24, 4), dtype=torch.int32)
    weight = from_compressed(packed, (torch.rand(192, 4) * 0.1).bfloat16(), zeros)
    x = torch.randn(5, 128).bfloat16()
    ours, theirs = (backend.int4_linear(weight, None)(x) for backend in (triton, plain))
    assert_close(ours, theirs, 10.0)


def test_quantized_inputs_are_alike() -> None:
    triton, plain = both()
    x = torch.randn(7, 256)
    for output in (QuantizedOutput(Scales.TOKEN, E4M3), QuantizedOutput(Scales.TOKEN, torch.int8)):
        ours, theirs = (backend.activate(x, Activation.IDENTITY, False, output) for backend in (triton, plain))
        torch.testing.assert_close(ours.scale, theirs.scale)
        assert (ours.values.float() - theirs.values.float()).abs().max() <= (32 if output.dtype == E4M3 else 1)
