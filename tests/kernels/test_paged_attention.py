"""Paged attention in Triton against its reference, and the reference against softmax written out."""

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import pytest
import torch
from paging import make_batch, poisoned
from quire_kernels.backends import AttentionBatch
from quire_kernels.paged_attention import PLAIN, AttentionOptions, reference
from quire_kernels.paged_attention.pieces import Pieces, merge
from quire_kernels.paged_attention.triton import paged_attention
from tolerance import FP8, assert_close

CASES = [  # new tokens, context
    ([1], [1]),
    ([1, 1, 1], [1, 64, 63]),
    ([1], [1500]),  # cut into pieces
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
    cuts: dict[Hashable, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Kernel's result and log-sum-exp, then the reference's in fp32."""
    shape = (sum(-(-c // block_size) for c in batch.context_lens.tolist()) + 2, kv_heads, block_size, dim)
    keys = poisoned(batch, shape, cache_dtype or dtype)
    values = poisoned(batch, shape, cache_dtype or dtype)
    q = torch.randn(int(batch.query_starts[-1]), heads, dim).to(dtype)
    lse = torch.full(q.shape[:2], float("nan"))
    got = paged_attention(
        q, keys, values, batch.block_tables, batch.query_starts, batch.context_lens,
        batch.longest_query, dim**-0.5, options, lse, cuts=cuts,
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


CUT = ([1, 1, 9, 0, 30, 3], [2600, 60, 40, 9, 1700, 700])  # on the interpreter's 4 multiprocessors
CUT_SPANS = torch.zeros(sum(CUT[0]), 2, dtype=torch.int32)
CUT_SPANS[15:25] = torch.tensor([1600, 1700])  # of the fifth request, which sees tokens behind its own
CUT_SPANS[40] = torch.tensor([5, 9])  # an image outside of its window


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"options": AttentionOptions(window=900)},
        {"options": AttentionOptions(window=1100, sinks=torch.randn(8), soft_cap=1.5, alibi_slopes=torch.rand(8))},
        {"options": AttentionOptions(sinks=torch.randn(8) + 5)},
        {"options": AttentionOptions(spans=CUT_SPANS)},
        {"options": AttentionOptions(spans=CUT_SPANS, window=900)},
        {"dtype": torch.bfloat16},
        {
            "dtype": torch.bfloat16,
            "cache_dtype": torch.float8_e4m3fn,
            "options": AttentionOptions(key_scale=torch.rand(2) + 0.5, value_scale=torch.rand(2) + 0.5),
        },
    ],
    ids=["plain", "window", "all", "sinks", "spans", "spans in a window", "bf16", "fp8 cache"],
)
def test_long_contexts_are_cut(more: dict[str, Any]) -> None:
    """In both launches, some tiles whole and some in pieces, whose parts are NaN where none was written."""
    cuts: dict[Hashable, torch.Tensor] = {}
    check(*CUT, 16, 8, 2, 64, cuts=cuts, **more)
    assert len(cuts) == 2
    for listed in cuts.values():
        assert 1 < listed[0, 1] < len(listed)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 80), (4, 4, 256), (16, 1, 128)])
def test_cut_at_other_sizes(heads: int, kv_heads: int, dim: int) -> None:
    cuts: dict[Hashable, torch.Tensor] = {}
    check([1, 1, 18], [1900, 20, 1600], 64, heads, kv_heads, dim, cuts=cuts)
    assert all(listed[0, 1] > 1 for listed in cuts.values())


def test_a_step_is_cut_once() -> None:
    batch = make_batch(*CUT, 16, sum(-(-c // 16) for c in CUT[1]) + 2)
    cuts: dict[Hashable, torch.Tensor] = {}
    for window in (0, 0, 900, 900):
        both(batch, 8, 2, 64, 16, AttentionOptions(window=window), cuts=cuts)
    assert len(cuts) == 4  # narrow and wide, for each window
    listed = [kept.clone() for kept in cuts.values()]
    for kept in cuts.values():
        kept[0, 1] = 0  # a layer that made its own list would not miss these pieces
    got, _, expected, _ = both(batch, 8, 2, 64, 16, cuts=cuts)
    assert got.isnan().any() and not expected.isnan().any()
    assert all(kept[0, 1] == 0 and old[0, 1] > 1 for kept, old in zip(cuts.values(), listed, strict=True))


def test_merge_joins_disjoint_keys() -> None:
    """The parts of two tiles, of 7 and 3 live tokens; between them tokens of requests that were not cut."""
    tile_tokens, heads, dim = 7, 3, 80
    query_starts = torch.tensor([0, 2, 16, 19], dtype=torch.int32)
    tiles = [(1, 1, 5, slice(9, 16)), (2, 0, 2, slice(16, 19))]  # request, tile, pieces, the tokens of the result
    rows = [[512, 7, 0, 0], *([r, tile, i, n] for r, tile, n, _ in tiles for i in range(n))]
    listed = torch.cat((torch.tensor(rows, dtype=torch.int32), torch.empty(4, 4, dtype=torch.int32)))
    parts, part_lse = torch.randn(11, tile_tokens, heads, dim), torch.randn(11, tile_tokens, heads) * 3
    part_lse[1, 2] = float("-inf")
    parts[5:7, 3:], part_lse[5:7, 3:] = float("nan"), float("nan")  # past the second request's tokens
    out, lse = torch.zeros(19, heads, dim), torch.zeros(19, heads)
    merge(Pieces(listed, parts, part_lse), query_starts, out, lse)
    at = 0
    for _, _, pieces, to in tiles:
        live = to.stop - to.start
        expected = reference.merge(parts[at : at + pieces, :live], part_lse[at : at + pieces, :live])
        for got, wanted in zip((out[to], lse[to]), expected, strict=True):
            assert torch.isfinite(wanted).all()
            assert_close(got, wanted)
        at += pieces
    assert not out[:9].any() and not lse[:9].any()


def test_the_reference_of_merging_is_attention() -> None:
    q, k, v = torch.randn(7, 16), torch.randn(50, 16), torch.randn(50, 16)
    scores = q @ k.T
    halves = [scores[:, :20], scores[:, 20:]]
    outs = torch.stack([h.softmax(-1) @ v[s] for h, s in zip(halves, (slice(20), slice(20, None)), strict=True)])
    lses = torch.stack([h.logsumexp(-1) for h in halves])
    whole, whole_lse = reference.merge(outs[:, :, None], lses[:, :, None])
    assert_close(whole[:, 0], scores.softmax(-1) @ v)
    assert_close(whole_lse[:, 0], scores.logsumexp(-1))


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
