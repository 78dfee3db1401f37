"""How FlashAttention 3 is called, by a stand-in that computes what its documentation says of each argument: the library
runs on GPUs alone."""

import sys
from types import SimpleNamespace

import pytest
import torch
from paging import make_batch, poisoned
from quire_kernels import flash
from quire_kernels.flash_backend import FlashBackend
from quire_kernels.paged_attention import PLAIN, AttentionOptions, reference
from tolerance import assert_close

calls: list[int] = []


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    cache_seqlens: torch.Tensor,
    page_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
) -> torch.Tensor:
    """Caches (pages, page size, heads, head dim); bottom-right causal; a query at i sees [i - left, i + right]."""
    assert causal
    assert k_cache.stride(-1) == v_cache.stride(-1) == 1
    assert cache_seqlens.dtype == page_table.dtype == cu_seqlens_q.dtype == torch.int32
    assert max_seqlen_q == int(cu_seqlens_q.diff().max())
    calls.append(len(q))
    out = torch.empty_like(q)
    for r, length in enumerate(cache_seqlens.tolist()):
        begin, end = cu_seqlens_q[r : r + 2].tolist()
        pages = page_table[r].long()
        k, v = (x[pages].flatten(0, 1)[:length].float() for x in (k_cache, v_cache))  # [length, heads, dim]
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q[begin:end].float(), k) * softmax_scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        at = torch.arange(length - (end - begin), length)[:, None]
        key = torch.arange(length)[None, :]
        seen = key <= at
        if window_size != (-1, -1):
            seen &= (key >= at - window_size[0]) & (key <= at + window_size[1])
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out[begin:end] = torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)
    return out


@pytest.mark.parametrize("options", [PLAIN, AttentionOptions(window=100), AttentionOptions(soft_cap=5.0)], ids=str)
def test_long_prompts(options: AttentionOptions) -> None:
    batch = make_batch([600, 1, 30], [700, 90, 30], 16, 60)
    keys, values = (poisoned(batch, (60, 2, 16, 64), torch.bfloat16) for _ in range(2))
    q = torch.randn(631, 3, 4, 64).to(torch.bfloat16)[:, 1]  # rows are strided, as in a product for q, k and v
    calls.clear()
    backend = FlashBackend(torch.device("cpu"), flash_attn_with_kvcache)
    got = backend.paged_attention(q, keys, values, batch, 0.125, options)
    assert calls == [631]
    expected, _ = reference.attention_with_lse(
        q.float(), keys, values, batch.block_tables, batch.query_starts, batch.context_lens, 0.125, options
    )
    assert_close(got, expected)


def test_what_it_does_not_compute_is_tritons() -> None:
    long, short = make_batch([600], [600], 16, 40), make_batch([64], [64], 16, 40)
    q, cache = torch.randn(600, 4, 64).to(torch.bfloat16), torch.randn(40, 2, 16, 64).to(torch.bfloat16)
    assert flash.fits(q, cache, long, PLAIN)
    assert not flash.fits(q, cache, short, PLAIN)
    assert not flash.fits(q.float(), cache.float(), long, PLAIN)
    assert not flash.fits(q, cache.to(torch.float8_e4m3fn), long, PLAIN)
    assert not flash.fits(q, cache, long, AttentionOptions(sinks=torch.zeros(4)))


def test_it_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert flash.load() is None
    monkeypatch.setattr(flash, "MODULE", __name__)
    monkeypatch.setitem(sys.modules, __name__, SimpleNamespace(flash_attn_with_kvcache=flash_attn_with_kvcache))
    assert flash.load() is flash_attn_with_kvcache
