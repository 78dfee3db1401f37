"""Products in Triton: batch-invariant ones to the bit, quantized ones against dequantized ones."""

from types import SimpleNamespace

import pytest
import torch
from quire_kernels import triton_backend
from quire_kernels.hardware import CHIPS, stands_for
from quire_kernels.matmul import reference as plain
from quire_kernels.matmul.triton import matmul
from quire_kernels.quantize import Quantized, QuantizedOutput, Scales
from quire_kernels.quantize.reference import quantize
from quire_kernels.quantized_matmul import reference
from quire_kernels.quantized_matmul.int4 import from_awq, from_gptq, pack, unpack
from quire_kernels.quantized_matmul.library import library_matmul
from quire_kernels.quantized_matmul.triton import int4_matmul, scaled_matmul
from quire_kernels.triton_backend import TritonBackend
from tolerance import FP8, assert_close


def poisoned(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Random rows, with NaN in the memory around them."""
    whole = torch.full((rows + 2, columns), float("nan"), dtype=dtype)
    whole[1:-1] = torch.randn(rows, columns).to(dtype)
    return whole[1:-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 63, 1000), (63, 300, 64), (130, 136, 520)])
def test_matmul(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    a, w, bias = poisoned(m, k, dtype), poisoned(n, k, dtype), torch.randn(n).to(dtype)
    assert_close(matmul(a, w), plain.matmul(a, w), k**0.5)
    assert_close(matmul(a, w, bias), plain.matmul(a, w, bias), k**0.5)


@pytest.mark.parametrize("k", [64, 1000])
def test_a_row_of_a_product_has_the_same_bits_in_any_batch(k: int) -> None:
    a, w = torch.randn(200, k).bfloat16(), torch.randn(70, k).bfloat16()
    whole = matmul(a, w)
    for begin, end in ((0, 1), (3, 70), (150, 200)):
        assert torch.equal(matmul(a[begin:end], w), whole[begin:end])


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize(("a_scales", "w_scales"), [(1, 1), (2, 2), (2, 1), (1, 2), (3, 3)])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 63, 1152), (63, 300, 128), (130, 136, 640)])
def test_fp8(m: int, n: int, k: int, a_scales: int, w_scales: int, dtype: torch.dtype) -> None:
    given = torch.tensor([0.01])
    a = quantize(poisoned(m, k, torch.float32), QuantizedOutput(Scales(a_scales), dtype, given))
    if w_scales == 3:
        w = torch.randn(n, k).to(dtype)
        w_scale = torch.rand(-(-n // 128), k // 128) + 0.1
    else:
        quantized = quantize(torch.randn(n, k), QuantizedOutput(Scales(w_scales), dtype, given))
        w, w_scale = quantized.values, quantized.scale
    bias = torch.randn(n).bfloat16()
    got = scaled_matmul(a.values, a.scale, w, w_scale, torch.bfloat16, bias)
    expected = reference.scaled_matmul(a.values, a.scale, w, w_scale, torch.bfloat16, bias)
    assert_close(got, expected, k**0.5)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("a_scales", "w_scales"), [(130, 48), (1, 48), (130, 1), (1, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_fp8_by_the_library(device: str, a_scales: int, w_scales: int, bias: bool) -> None:
    """torch's own product of a CPU; on "meta" it checks what a GPU's is given."""
    m, n, k = 130, 48, 256
    a, w = (torch.randn(rows, k).to(torch.float8_e4m3fn) for rows in (m, n))
    a_scale, w_scale = torch.rand(a_scales) + 0.1, torch.rand(w_scales) + 0.1
    shift = torch.randn(n).bfloat16() if bias else None
    given = [None if x is None else x.to(device) for x in (a, a_scale, w, w_scale, shift)]
    got = library_matmul(*given[:4], torch.bfloat16, given[4])
    expected = reference.scaled_matmul(a, a_scale, w, w_scale, torch.bfloat16, shift)
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    if device == "cpu":
        assert_close(got, expected, k**0.5)


def test_whose_fp8_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's where there is one for the chip, the type, the scales and the sizes, and there are many rows."""
    meta, fp8 = torch.device("meta"), torch.float8_e4m3fn
    ours: list[int] = []
    monkeypatch.setattr(triton_backend, "scaled_matmul", lambda a, *_: ours.append(a.shape[0]))

    def rows_of_ours(
        chip: str, n: int = 64, k: int = 256, kind: torch.dtype = fp8, scale: tuple[int, ...] = (64,),
        dtype: torch.dtype = torch.bfloat16, deterministic: bool = False,
    ) -> list[int]:  # fmt: skip
        ours.clear()
        with stands_for(CHIPS[chip]):
            backend = TritonBackend(meta, deterministic=deterministic)
            weight = torch.empty(n, k, dtype=kind, device=meta)
            multiply = backend.scaled_linear(weight, torch.empty(scale, device=meta), None, dtype)
            for rows in (1, 64, 65, 4096):
                x = torch.empty(rows, k, dtype=kind, device=meta)
                multiply(Quantized(x, torch.empty(rows, device=meta)))
        return ours

    every = [1, 64, 65, 4096]
    for chip in ("sm_89", "sm_90", "sm_100"):
        assert rows_of_ours(chip) == [1, 64]
    for chip in ("sm_120", "gfx942", "gfx950"):
        assert rows_of_ours(chip) == every
    assert rows_of_ours("sm_90", deterministic=True) == every
    assert rows_of_ours("sm_90", kind=torch.int8) == every
    assert rows_of_ours("sm_90", dtype=torch.float16) == every
    assert rows_of_ours("sm_90", scale=(1, 2)) == every
    assert rows_of_ours("sm_90", n=72, scale=(72,)) == every
    assert rows_of_ours("sm_90", k=264) == every


@pytest.mark.parametrize(("m", "n", "k"), [(1, 63, 1152), (63, 300, 64), (130, 136, 700)])
def test_int8(m: int, n: int, k: int) -> None:
    a, w = (torch.randint(-127, 128, (rows, k), dtype=torch.int8) for rows in (m, n))
    a_scale, w_scale = torch.rand(m) * 0.02, torch.rand(n) * 0.02
    if m == 1:
        a_scale = a_scale[:1]
    got = scaled_matmul(a, a_scale, w, w_scale, torch.float32)
    assert_close(got, reference.scaled_matmul(a, a_scale, w, w_scale, torch.float32), k**0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 64, 1024), (63, 200, 256), (130, 136, 384)])
def test_int4(m: int, n: int, k: int, group: int, symmetric: bool, dtype: torch.dtype) -> None:
    awq = awq_weight(n, k, group, dtype, 8 if symmetric else None)
    weight = from_awq(awq.qweight, awq.qzeros, awq.scales)
    assert (weight.zeros is None) == symmetric
    a = poisoned(m, k, dtype)
    assert_close(int4_matmul(a, weight), (a.float() @ awq.weight.T).to(dtype), k**0.5 * 0.5)


def awq_weight(n: int, k: int, group: int, dtype: torch.dtype, zero: int | None) -> SimpleNamespace:
    """As AutoAWQ's gemm version writes it: word i of a row holds columns 8i + (0 2 4 6 1 3 5 7), lowest bits first."""
    values = torch.randint(0, 16, (k, n))
    zeros = torch.randint(0, 16, (k // group, n)) if zero is None else torch.full((k // group, n), zero)
    scales = (torch.rand(k // group, n) * 0.1).to(dtype)

    def words(x: torch.Tensor) -> torch.Tensor:
        packed = torch.zeros(x.shape[0], -(-n // 8), dtype=torch.int64)
        padded = torch.nn.functional.pad(x, (0, packed.shape[1] * 8 - n)).unflatten(1, (-1, 8))
        for nibble, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            packed |= padded[:, :, column] << (4 * nibble)
        return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)

    spread = zeros.repeat_interleave(group, 0), scales.float().repeat_interleave(group, 0)
    weight = ((values - spread[0]) * spread[1]).T
    return SimpleNamespace(qweight=words(values), qzeros=words(zeros), scales=scales, weight=weight)


def test_gptq_layout() -> None:
    """Words hold eight rows of one column, lowest bits first; zeros are stored less one."""
    k, n, group = 128, 16, 64
    values, zeros = torch.randint(0, 16, (k, n)), torch.randint(1, 17, (k // group, n))
    qweight = torch.zeros(k // 8, n, dtype=torch.int64)
    qzeros = torch.zeros(k // group, n // 8, dtype=torch.int64)
    for i in range(8):
        qweight |= values[i::8] << (4 * i)
        qzeros |= (zeros[:, i::8] - 1) << (4 * i)
    signed = [torch.where(x >= 2**31, x - 2**32, x).to(torch.int32) for x in (qweight, qzeros)]
    scales = torch.rand(k // group, n)
    weight = from_gptq(*signed, scales, torch.arange(k) // group)
    expected = (values - zeros.repeat_interleave(group, 0)) * scales.repeat_interleave(group, 0)
    assert_close(reference.dequantize_int4(weight), expected.T)
    with pytest.raises(ValueError, match="desc_act"):
        from_gptq(*signed, scales, torch.randperm(k) // group)


def test_pack_keeps_every_value() -> None:
    values = torch.randint(0, 16, (5, 192), dtype=torch.uint8)
    assert torch.equal(unpack(pack(values)), values)
