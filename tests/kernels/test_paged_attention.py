"""Paged attention in Triton against its reference, and the reference against softmax written out."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from paging import make_batch, poisoned
from quire_kernels.backends import AttentionBatch
from quire_kernels.hardware import CHIPS
from quire_kernels.paged_attention import PLAIN, AttentionOptions, reference
from quire_kernels.paged_attention.triton import paged_attention
from tolerance import FP8, assert_close

CASES = [  # new tokens, context
    ([1], [1]),
    ([1, 1, 1], [1, 64, 63]),
    ([1], [1500]),  # split into segments
    ([5, 1, 0, 17], [20, 33, 4, 17]),  # mixed: a narrow and a wide launch; one request has nothing new
    ([63], [63]),
    ([140, 1], [200, 130]),
]


def both(
    batch: AttentionBatch,
    heads: int,
    kv_heads: int,
    dim: int,
    block_size: int,
    options: AttentionOptions = PLAIN,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Kernel's result and log-sum-exp, then the reference's in fp32."""
    shape = (sum(-(-c // block_size) for c in batch.context_lens.tolist()) + 2, kv_heads, block_size, dim)
    keys = poisoned(batch, shape, cache_dtype or dtype)
    values = poisoned(batch, shape, cache_dtype or dtype)
    q = torch.randn(int(batch.query_starts[-1]), heads, dim).to(dtype)
    lse = torch.full(q.shape[:2], float("nan"))
    got = paged_attention(
        q, keys, values, batch.block_tables, batch.query_starts, batch.context_lens,
        batch.longest_query, dim**-0.5, options, lse,
    )  # fmt: skip
    expected, expected_lse = reference.attention_with_lse(
        q.float(), keys, values, batch.block_tables, batch.query_starts, batch.context_lens, dim**-0.5, options
    )
    assert torch.isfinite(expected).all()
    return got, lse, expected, expected_lse


def check(queries: list[int], contexts: list[int], block_size: int, *arguments: int, **more: Any) -> None:
    batch = make_batch(queries, contexts, block_size, sum(-(-c // block_size) for c in contexts) + 2)
    heads, kv_heads, dim = arguments
    got, lse, expected, expected_lse = both(batch, heads, kv_heads, dim, block_size, **more)
    assert_close(got, expected)
    torch.testing.assert_close(lse, expected_lse, atol=2e-2 if got.dtype != torch.float32 else 2e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [0, 7, 70])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block_size"), [(9, 3, 64, 16), (8, 1, 128, 64)])
@pytest.mark.parametrize(("queries", "contexts"), CASES)
def test_ragged_batches(
    queries: list[int], contexts: list[int], heads: int, kv_heads: int, dim: int, block_size: int, window: int
) -> None:
    check(queries, contexts, block_size, heads, kv_heads, dim, options=AttentionOptions(window=window))


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("block_size", [16, 64])
def test_head_dims(dim: int, block_size: int) -> None:
    check([3, 1, 70], [50, 65, 80], block_size, 4, 2, dim)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    check([5, 1, 70], [20, 33, 90], 16, 4, 2, 64, dtype=dtype)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("cache_dtype", FP8)
def test_fp8_cache(cache_dtype: torch.dtype, per_head: bool) -> None:
    scales = torch.rand(2, 2) + 0.5 if per_head else torch.full((2, 2), 0.7)
    options = AttentionOptions(key_scale=scales[0], value_scale=scales[1])
    check([5, 1, 70], [20, 1100, 90], 16, 4, 2, 64, dtype=torch.bfloat16, cache_dtype=cache_dtype, options=options)


@pytest.mark.parametrize(
    "options",
    [
        AttentionOptions(soft_cap=2.0),
        AttentionOptions(sinks=torch.randn(8)),
        AttentionOptions(sinks=torch.randn(8), window=9),
        AttentionOptions(alibi_slopes=2.0 ** -torch.arange(1, 9)),
        AttentionOptions(soft_cap=1.5, sinks=torch.randn(8), alibi_slopes=torch.rand(8), window=33),
    ],
    ids=["soft cap", "sinks", "sinks in a window", "alibi", "all"],
)
@pytest.mark.parametrize(("queries", "contexts"), [CASES[2], CASES[3], CASES[5]])
def test_options(queries: list[int], contexts: list[int], options: AttentionOptions) -> None:
    check(queries, contexts, 16, 8, 2, 64, options=options)


@pytest.mark.parametrize("window", [0, 12])
def test_tokens_of_an_image_see_each_other(window: int) -> None:
    spans = torch.zeros(74, 2, dtype=torch.int32)
    spans[4:30] = torch.tensor([14, 40])  # the first request's positions 14 .. 39
    spans[73] = torch.tensor([5, 9])  # the second sees an image outside of its window
    options = AttentionOptions(spans=spans, window=window)
    check([73, 1], [83, 40], 16, 4, 2, 64, options=options)
    causal = replace(options, spans=None)
    batch = make_batch([73], [83], 16, 8)
    torch.manual_seed(0)
    with_spans = both(batch, 4, 2, 64, 16, replace(options, spans=spans[:73]))[0]
    torch.manual_seed(0)
    without = both(batch, 4, 2, 64, 16, causal)[0]
    assert not torch.equal(with_spans[4:29], without[4:29])


def test_merge_joins_disjoint_keys() -> None:
    parts, lse = torch.randn(5, 7, 3, 80), torch.randn(5, 7, 3) * 3
    lse[1, 2] = float("-inf")
    parts[1, 2] = float("nan")  # a part that saw no key holds nothing
    for got, expected in zip(merge(parts, lse), reference.merge(parts, lse), strict=True):
        assert torch.isfinite(expected).all()
        assert_close(got, expected)
    q, k, v = torch.randn(7, 16), torch.randn(50, 16), torch.randn(50, 16)
    scores = q @ k.T
    halves = [scores[:, :20], scores[:, 20:]]
    outs = torch.stack([h.softmax(-1) @ v[s] for h, s in zip(halves, (slice(20), slice(20, None)), strict=True)])
    lses = torch.stack([h.logsumexp(-1) for h in halves])
    whole, whole_lse = merge(outs[:, :, None], lses[:, :, None])
    assert_close(whole[:, 0], scores.softmax(-1) @ v)
    assert_close(whole_lse[:, 0], scores.logsumexp(-1))


def test_segments_depend_on_shapes_alone_and_fill_the_chip() -> None:
    chip = CHIPS["sm_90"]
    assert num_segments(chip, 8, 32768) == 33  # one request, eight heads: two programs on each of 132
    assert num_segments(chip, 256 * 8, 32768) == 1
    assert num_segments(chip, 8, 400) == 1


def test_the_reference_is_attention() -> None:
    """Written out for one query: softmax over what it sees."""
    batch = make_batch([1], [37], 16, 5)
    keys, values = poisoned(batch, (5, 1, 16, 32), torch.float32), poisoned(batch, (5, 1, 16, 32), torch.float32)
    q = torch.randn(1, 1, 32)
    seen = [(int(batch.block_tables[0, p // 16]), p % 16) for p in range(37)]
    k = torch.stack([keys[page, 0, offset] for page, offset in seen])
    v = torch.stack([values[page, 0, offset] for page, offset in seen])
    expected = torch.softmax(k @ q[0, 0] * 0.2, 0) @ v
    arguments = (q, keys, values, batch.block_tables, batch.query_starts, batch.context_lens, 0.2)
    for got in (reference.paged_attention(*arguments), reference.attention_with_lse(*arguments)[0]):
        torch.testing.assert_close(got[0, 0], expected, atol=1e-5, rtol=0)
