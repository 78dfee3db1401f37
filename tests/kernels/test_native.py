"""The C kernels against their plain references, with poison wherever nothing may be read."""

import pytest
import torch
from paging import make_batch, poisoned
from quire_kernels.activation import Activation
from quire_kernels.cache_write import HeadNorm, Rope
from quire_kernels.native.backend import NativeBackend
from quire_kernels.norm import Norm
from quire_kernels.paged_attention import AttentionOptions
from quire_kernels.torch_backend import TorchBackend


@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size"),
    [(9, 3, 64, 16), (4, 4, 80, 16), (8, 1, 128, 32), (6, 2, 96, 8)],
)
def test_paged_attention(heads: int, kv_heads: int, dim: int, block_size: int, window: int) -> None:
    options = AttentionOptions(window=window)
    for queries, contexts in (
        ([1], [1]),
        ([1, 1, 1], [1, 16, 63]),
        ([5, 1, 17], [20, 33, 17]),
        ([63], [63]),
        ([40, 1], [100, 100]),
    ):
        batch = make_batch(queries, contexts, block_size, 40)
        keys, values = (poisoned(batch, (40, kv_heads, block_size, dim), torch.float32) for _ in range(2))
        q = torch.randn(sum(queries), heads, dim)
        expected = TorchBackend().paged_attention(q, keys, values, batch, dim**-0.5, options)
        got = NativeBackend().paged_attention(q, keys, values, batch, dim**-0.5, options)
        assert torch.isfinite(expected).all()
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("rotary", [64, 32])
@pytest.mark.parametrize("tokens", [1, 63])
def test_rope_cache_write(tokens: int, rotary: int, qk_norm: bool) -> None:
    heads, kv_heads, dim, size = 6, 2, 64, 16
    batch = make_batch([tokens], [tokens + 5], size, 8)
    batch.slots[::3] = -1
    cos_sin = torch.randn(100, 2, rotary // 2)
    norm = HeadNorm(q_weight=torch.randn(dim), k_weight=torch.randn(dim), eps=1e-6) if qk_norm else None
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim)
    results = []
    for backend in (NativeBackend(), TorchBackend()):
        mine, keys, values = (
            qkv.clone(),
            torch.full((8, kv_heads, size, dim), 7.0),
            torch.full((8, kv_heads, size, dim), 7.0),
        )
        backend.rope_cache_write(mine, keys, values, batch, heads, Rope(cos_sin=cos_sin), norm, None)
        results.append((mine[:, : heads * dim], keys, values))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("tokens", "width"), [(1, 63), (63, 1000), (1000, 64)])
def test_norm_and_activation(tokens: int, width: int) -> None:
    native, torch_backend = NativeBackend(), TorchBackend()
    residual, delta, weight = torch.randn(tokens, width), torch.randn(tokens, width), torch.randn(width)
    for added in (delta, None):
        mine, theirs = residual.clone(), residual.clone()
        got = native.add_norm(mine, added, weight, Norm(1e-5))
        expected = torch_backend.add_norm(theirs, added, weight, Norm(1e-5))
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(mine, theirs, atol=0, rtol=0)
    gates = torch.randn(tokens, 2 * width) * 30
    ours, theirs = (backend.activate(gates, Activation.SILU, True) for backend in (native, torch_backend))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)
