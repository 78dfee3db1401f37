"""The C and Triton kernels against their plain references, with poison wherever nothing may be read."""

import math

import numpy as np
import pytest
import torch
from quire_kernels.backends import AttentionBatch, Backend, NativeBackend, TorchBackend, attention_tiles
from quire_kernels.triton_backend import TritonBackend

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3}
BACKENDS = {"native": NativeBackend, "triton": lambda: TritonBackend(torch.device("cpu"))}


def make_batch(queries: list[int], contexts: list[int], block_size: int, num_pages: int) -> AttentionBatch:
    starts = np.concatenate(([0], np.cumsum(queries))).astype(np.int32)
    width = max(-(-c // block_size) for c in contexts)
    free = torch.randperm(num_pages).tolist()
    tables = torch.full((len(queries), width), num_pages - 1, dtype=torch.int32)
    positions, slots = [], []
    for r, (count, context) in enumerate(zip(queries, contexts, strict=True)):
        pages = [free.pop() for _ in range(-(-context // block_size))]
        tables[r, : len(pages)] = torch.tensor(pages)
        for position in range(context - count, context):
            positions.append(position)
            slots.append(pages[position // block_size] * block_size + position % block_size)
    return AttentionBatch(
        positions=torch.tensor(positions, dtype=torch.int32),
        slots=torch.tensor(slots),
        block_tables=tables,
        query_starts=starts.tolist(),
        context_lens=list(contexts),
        tiles=torch.from_numpy(attention_tiles(queries, starts.tolist())),
        query_starts_tensor=torch.from_numpy(starts),
        context_lens_tensor=torch.tensor(contexts, dtype=torch.int32),
    )


def poisoned_caches(
    batch: AttentionBatch, shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """NaN everywhere but in the slots of the requests' contexts."""
    caches = tuple(torch.full(shape, math.nan, dtype=dtype) for _ in range(2))
    size = shape[2]
    for r, context in enumerate(batch.context_lens):
        for position in range(context):
            page = int(batch.block_tables[r, position // size])
            for cache in caches:
                cache[page, :, position % size] = torch.randn(shape[1], shape[3]).to(dtype)
    return caches[0], caches[1]


CASES = [
    ([1], [1]),
    ([1, 1, 1], [1, 16, 63]),
    ([5, 1, 17], [20, 33, 17]),
    ([63], [63]),
    ([40, 1], [100, 100]),
]


@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size"),
    [(9, 3, 64, 16), (4, 4, 80, 16), (8, 1, 128, 32), (6, 2, 96, 8)],
)
@pytest.mark.parametrize("name", BACKENDS)
def test_paged_attention(name: str, heads: int, kv_heads: int, dim: int, block_size: int, window: int) -> None:
    backend: Backend = BACKENDS[name]()
    for queries, contexts in CASES:
        batch = make_batch(queries, contexts, block_size, 40)
        keys, values = poisoned_caches(batch, (40, kv_heads, block_size, dim), torch.float32)
        q = torch.randn(sum(queries), heads, dim)
        expected = TorchBackend().paged_attention(q, keys, values, batch, dim**-0.5, window)
        got = backend.paged_attention(q, keys, values, batch, dim**-0.5, window)
        assert torch.isfinite(expected).all()
        torch.testing.assert_close(got, expected, atol=TOLERANCE[torch.float32], rtol=0)


def test_paged_attention_in_half_precision() -> None:
    batch = make_batch([5, 1], [20, 33], 16, 8)
    keys, values = poisoned_caches(batch, (8, 2, 16, 64), torch.float16)
    q = torch.randn(6, 4, 64, dtype=torch.float16)
    expected = TorchBackend().paged_attention(q.float(), keys.float(), values.float(), batch, 0.125, 0)
    got = BACKENDS["triton"]().paged_attention(q, keys, values, batch, 0.125, 0)
    torch.testing.assert_close(got.float(), expected, atol=TOLERANCE[torch.float16], rtol=0)


def test_the_reference_is_attention() -> None:
    """Written out for one query: softmax over what it sees."""
    batch = make_batch([1], [37], 16, 5)
    keys, values = poisoned_caches(batch, (5, 1, 16, 32), torch.float32)
    q = torch.randn(1, 1, 32)
    seen = [(int(batch.block_tables[0, p // 16]), p % 16) for p in range(37)]
    k = torch.stack([keys[page, 0, offset] for page, offset in seen])
    v = torch.stack([values[page, 0, offset] for page, offset in seen])
    weights = torch.softmax(k @ q[0, 0] * 0.2, 0)
    got = TorchBackend().paged_attention(q, keys, values, batch, 0.2, 0)
    torch.testing.assert_close(got[0, 0], weights @ v, atol=1e-5, rtol=0)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("rotary", [64, 32])
@pytest.mark.parametrize("tokens", [1, 63])
def test_rope_cache_write(tokens: int, rotary: int, qk_norm: bool) -> None:
    heads, kv_heads, dim, size = 6, 2, 64, 16
    batch = make_batch([tokens], [tokens + 5], size, 8)
    batch.slots[::3] = -1
    cos_sin = torch.randn(100, 2, rotary // 2)
    weights = (torch.randn(dim), torch.randn(dim)) if qk_norm else (None, None)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim)
    results = []
    for backend in (NativeBackend(), TorchBackend()):
        mine, keys, values = (
            qkv.clone(),
            torch.full((8, kv_heads, size, dim), 7.0),
            torch.full((8, kv_heads, size, dim), 7.0),
        )
        backend.rope_cache_write(mine, keys, values, batch, cos_sin, *weights, 1e-6, heads)
        results.append((mine, keys, values))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("tokens", "width"), [(1, 63), (63, 1000), (1000, 64)])
def test_norm_and_activation(tokens: int, width: int) -> None:
    native, torch_backend = NativeBackend(), TorchBackend()
    residual, delta, weight = torch.randn(tokens, width), torch.randn(tokens, width), torch.randn(width)
    for added in (delta, None):
        mine, theirs = residual.clone(), residual.clone()
        got = native.add_rms_norm(mine, added, weight, 1e-5)
        expected = torch_backend.add_rms_norm(theirs, added, weight, 1e-5)
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(mine, theirs, atol=0, rtol=0)
    gates = torch.randn(tokens, 2 * width) * 30
    torch.testing.assert_close(native.silu_mul(gates), torch_backend.silu_mul(gates), atol=1e-4, rtol=1e-5)
