"""Latent attention in Triton against its reference, and absorption against attention over full keys and values."""

from collections.abc import Hashable

import pytest
import torch
from paging import make_batch, poisoned
from quire_kernels.mla import reference
from quire_kernels.mla.triton import latent_attention, latent_cache_write
from tolerance import assert_close


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("latent", "turned", "heads", "block_size"), [(512, 64, 16, 64), (64, 16, 3, 16)])
@pytest.mark.parametrize(
    ("queries", "contexts"),
    [([1], [1]), ([1, 1], [70, 1100]), ([5, 1, 0, 17], [20, 33, 4, 17]), ([63], [90]), ([4, 1, 1], [1500, 2600, 9])],
)
def test_latent_attention(
    queries: list[int], contexts: list[int], latent: int, turned: int, heads: int, block_size: int, dtype: torch.dtype
) -> None:
    pages = sum(-(-c // block_size) for c in contexts) + 2
    batch = make_batch(queries, contexts, block_size, pages)
    cache = poisoned(batch, (pages, 1, block_size, latent + turned), dtype)[:, 0]
    q = torch.randn(sum(queries), heads, latent + turned).to(dtype)
    lse = torch.full(q.shape[:2], float("nan"))
    scale = (latent + turned) ** -0.5
    cuts: dict[Hashable, torch.Tensor] = {}
    got = latent_attention(
        q, cache, batch.block_tables, batch.query_starts, batch.context_lens, scale, latent, lse, cuts
    )
    expected, expected_lse = reference.latent_attention(
        q.float(), cache, batch.block_tables, batch.query_starts, batch.context_lens, scale, latent
    )
    (listed,) = cuts.values()
    assert (listed[0, 1] > 1) == (max(contexts) > 1000)  # long ones are cut
    assert torch.isfinite(expected).all()
    assert_close(got, expected)
    torch.testing.assert_close(lse, expected_lse, atol=2e-2 if dtype != torch.float32 else 2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 63])
def test_latent_cache_write(tokens: int, dtype: torch.dtype) -> None:
    batch = make_batch([tokens], [tokens + 5], 16, 8)
    batch.slots[::3] = -1
    width = 64
    latent, q = torch.randn(tokens, width + 32 + 4).to(dtype)[:, :-4], torch.randn(tokens, 3, 80).to(dtype)
    cos_sin, weight = torch.randn(100, 2, 16), torch.randn(width).to(dtype)
    results = []
    for write in (latent_cache_write, reference.latent_cache_write):
        mine, cache = q.clone(), torch.full((8, 16, width + 32), 7.0).to(dtype)
        write(latent, mine[..., 48:], cache, batch.positions, batch.slots, cos_sin, weight, 1e-6)
        results.append((mine, cache))
    for got, expected in zip(*results, strict=True):
        assert_close(got, expected)


def test_absorbed_weights_give_the_same_attention() -> None:
    """DeepSeek's own formulation: keys and values projected up from the latent, one pair per head."""
    heads, latent, turned, nope, value, tokens = 3, 64, 16, 24, 20, 40
    up_key, up_value = torch.randn(heads, nope, latent) * 0.2, torch.randn(heads, value, latent) * 0.2
    batch = make_batch([tokens], [tokens], 16, 4)
    cache = poisoned(batch, (4, 1, 16, latent + turned), torch.float32)[:, 0]
    q_nope, q_turned = torch.randn(tokens, heads, nope), torch.randn(tokens, heads, turned)
    entries = cache[batch.slots // 16, batch.slots % 16]
    keys = torch.cat(
        (torch.einsum("tl,hnl->thn", entries[:, :latent], up_key), entries[:, None, latent:].expand(-1, heads, -1)), -1
    )
    values = torch.einsum("tl,hvl->thv", entries[:, :latent], up_value)
    full = torch.nn.functional.scaled_dot_product_attention(
        torch.cat((q_nope, q_turned), -1).transpose(0, 1), keys.transpose(0, 1), values.transpose(0, 1),
        is_causal=True, scale=0.3,
    ).transpose(0, 1)  # fmt: skip
    q = torch.cat((torch.einsum("thn,hnl->thl", q_nope, up_key), q_turned), -1)
    got = latent_attention(q, cache, batch.block_tables, batch.query_starts, batch.context_lens, 0.3, latent)
    assert_close(torch.einsum("thl,hvl->thv", got, up_value), full, 4.0)
