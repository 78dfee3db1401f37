"""The C kernels against their plain references, with poison wherever nothing may be read."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from paging import make_batch, poisoned
from quire_kernels.activation import Activation
from quire_kernels.backends import AttentionBatch
from quire_kernels.cache_write import HeadNorm, Rope
from quire_kernels.native import build
from quire_kernels.native.backend import NativeBackend
from quire_kernels.native.build import NativeBuildError
from quire_kernels.norm import Norm
from quire_kernels.paged_attention import AttentionOptions
from quire_kernels.torch_backend import TorchBackend


def test_without_a_folder_to_keep_them_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a user without a home, or where everything is read-only."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("QUIRE_CACHE", str(tmp_path / "file" / "folder"))
    with pytest.raises(NativeBuildError, match="set QUIRE_CACHE"):
        build.load()


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


def spans_around(batch: AttentionBatch) -> torch.Tensor:
    """About each token, within its request's context."""
    counts = batch.query_starts.diff()
    ends = torch.repeat_interleave(batch.context_lens, counts)
    return torch.stack(((batch.positions - 9).clamp(min=0), torch.minimum(batch.positions + 20, ends)), 1)


@pytest.mark.parametrize(("group", "dim"), [(2, 64), (20, 32)])
@pytest.mark.parametrize("kind", ["soft_cap", "sinks", "alibi", "spans"])
def test_what_families_add(group: int, dim: int, kind: str) -> None:
    heads = 2 * group
    batch = make_batch([1, 9, 20], [33, 9, 47], 16, 12)
    options = {
        "soft_cap": AttentionOptions(soft_cap=5.0, window=7),
        "sinks": AttentionOptions(sinks=torch.randn(heads) * 3),
        "alibi": AttentionOptions(alibi_slopes=torch.rand(heads)),
        "spans": AttentionOptions(spans=spans_around(batch), window=5),
    }[kind]
    keys, values = torch.randn(2, 12, 2, 16, dim)
    q = torch.randn(30, heads, dim) * 3
    got, expected = (b.paged_attention(q, keys, values, batch, 0.3, options) for b in (NativeBackend(), TorchBackend()))
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("window", [0, 21])
@pytest.mark.parametrize("dim", [40, 64, 80, 128])
def test_a_token_attends_with_the_same_bits_in_any_tile(dim: int, window: int) -> None:
    """Decoded alone, beside drafts, or as part of a prompt."""
    batch = make_batch([70], [170], 16, 12)
    keys, values = torch.randn(2, 12, 2, 16, dim)
    q, backend, options = torch.randn(70, 6, dim), NativeBackend(), AttentionOptions(window=window)
    whole = backend.paged_attention(q, keys, values, batch, 0.3, options)
    for size in range(1, 8):
        for begin in range(0, 70, size):
            part = slice(begin, min(begin + size, 70))
            alone = replace(
                batch,
                query_starts=torch.tensor([0, part.stop - begin], dtype=torch.int32),
                context_lens=batch.positions[part][-1:] + 1,
            )
            assert torch.equal(backend.paged_attention(q[part], keys, values, alone, 0.3, options), whole[part])


@pytest.mark.parametrize("norm", ["none", "before", "after"])
@pytest.mark.parametrize(("rotary", "interleaved"), [(64, False), (32, False), (32, True), (0, False)])
@pytest.mark.parametrize("tokens", [1, 63])
def test_rope_cache_write(tokens: int, rotary: int, interleaved: bool, norm: str) -> None:
    heads, kv_heads, dim, size = 6, 2, 64, 16
    batch = make_batch([tokens], [tokens + 5], size, 8)
    batch.slots[::3] = -1
    cos_sin = torch.randn(100, 2, rotary // 2)
    rope = Rope(cos_sin=cos_sin, interleaved=interleaved) if rotary else None
    weights = {name: torch.randn(dim) for name in ("q_weight", "k_weight")}
    after = norm == "after"
    head_norm = None if norm == "none" else HeadNorm(**weights, eps=1e-6, unit_offset=after, after_rope=after)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim)
    results = []
    for backend in (NativeBackend(), TorchBackend()):
        mine, keys, values = (
            qkv.clone(),
            torch.full((8, kv_heads, size, dim), 7.0),
            torch.full((8, kv_heads, size, dim), 7.0),
        )
        backend.rope_cache_write(mine, keys, values, batch, heads, rope, head_norm, None)
        results.append((mine[:, : heads * dim], keys, values))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("tokens", "width"), [(1, 63), (63, 1000), (1000, 64)])
@pytest.mark.parametrize("norm", [Norm(1e-5), Norm(1e-5, unit_offset=True), Norm(1e-5, "layer")])
def test_norm_and_activation(tokens: int, width: int, norm: Norm) -> None:
    native, torch_backend = NativeBackend(), TorchBackend()
    residual, delta, weight = torch.randn(tokens, width), torch.randn(tokens, width), torch.randn(width)
    for added in (delta, None):
        mine, theirs = residual.clone(), residual.clone()
        got = native.add_norm(mine, added, weight, None, norm)
        expected = torch_backend.add_norm(theirs, added, weight, None, norm)
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(mine, theirs, atol=0, rtol=0)
    gates = torch.randn(tokens, 2 * width) * 30
    ours, theirs = (backend.activate(gates, Activation.SILU, True) for backend in (native, torch_backend))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)
    ours, theirs = (backend.activate(gates, Activation.SIGMOID, False) for backend in (native, torch_backend))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_a_gate_has_the_same_bits_in_any_batch() -> None:
    """One number a token, so that their number decides which of them fill a vector."""
    gates, backend = torch.randn(50, 1) * 4, NativeBackend()
    whole = backend.activate(gates, Activation.SIGMOID, False)
    for count in range(1, 50):
        assert torch.equal(backend.activate(gates[:count], Activation.SIGMOID, False), whole[:count])
