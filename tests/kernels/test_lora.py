"""Low-rank adapters in Triton against their reference."""

import pytest
import torch
from quire_kernels.lora import reference
from quire_kernels.lora.triton import add_lora
from quire_kernels.moe.triton import align
from tolerance import assert_close


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "rank", "k", "n"), [(1, 8, 1000, 63), (63, 16, 136, 300), (150, 64, 640, 128)])
def test_add_lora(tokens: int, rank: int, k: int, n: int, dtype: torch.dtype) -> None:
    count, offset = 3, 40
    a, b = (torch.randn(count, rank, k) / k**0.5).to(dtype), torch.randn(count, n, rank).to(dtype)
    a[1] = float("nan")  # nobody uses it
    adapters = torch.randint(0, count + 1, (tokens,)).int()
    adapters[adapters == 1] = 0
    x, out = torch.randn(tokens, k + 8).to(dtype)[:, :k], torch.randn(tokens, n + 100).to(dtype)
    expected = out.float()
    reference.add_lora(expected, x, a, b, adapters, offset)
    before = out.clone()
    add_lora(out, x, a, b, align(adapters[:, None].contiguous(), count, 16), offset)
    assert_close(out, expected, rank**0.5)
    untouched = torch.ones_like(out, dtype=torch.bool)
    untouched[adapters < count, offset : offset + n] = False
    assert torch.equal(out[untouched], before[untouched])
