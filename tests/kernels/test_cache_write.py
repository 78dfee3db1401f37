"""The cache write in Triton against its reference, and the rotations against transformers' own."""

import pytest
import torch
from paging import make_batch
from quire_kernels.cache_write import CacheScales, HeadNorm, Rope, reference
from quire_kernels.cache_write.triton import copy_pages, rope_cache_write
from tolerance import FP8, assert_close

HEADS, KV_HEADS, SIZE = 6, 2, 16


def both(
    tokens: int,
    dim: int,
    rope: Rope | None,
    norm: HeadNorm | None = None,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
) -> None:
    batch = make_batch([tokens], [tokens + 5], SIZE, 70)
    batch.slots[::3] = -1
    positions = batch.positions % 100
    scales = None
    if cache_dtype is not None:
        scales = CacheScales(key=torch.rand(KV_HEADS) + 0.5, value=torch.rand(KV_HEADS) + 0.01)
    qkv = torch.randn(tokens, (HEADS + 2 * KV_HEADS) * dim).to(dtype)
    results = []
    for write in (rope_cache_write, reference.rope_cache_write):
        mine = qkv.clone()
        keys, values = (torch.full((70, KV_HEADS, SIZE, dim), 7.0).to(cache_dtype or dtype) for _ in range(2))
        write(mine, keys, values, positions, batch.slots, HEADS, rope, norm, scales)
        results.append((mine[:, : HEADS * dim], keys, values))
    for got, expected in zip(*results, strict=True):
        assert_close(got, expected)
    unwritten = torch.ones(70 * SIZE, dtype=torch.bool)
    unwritten[batch.slots[batch.slots >= 0]] = False
    got = results[0][1].transpose(1, 2).reshape(70 * SIZE, -1).float()
    assert (got[unwritten] == 7.0).all()
    assert (got[~unwritten] != 7.0).any(1).all()


def head_norm(dim: int, unit_offset: bool, dtype: torch.dtype, after_rope: bool = False) -> HeadNorm:
    weights = {name: torch.randn(dim).to(dtype) for name in ("q_weight", "k_weight")}
    return HeadNorm(**weights, eps=1e-6, unit_offset=unit_offset, after_rope=after_rope)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "rotary"), [(64, 64), (80, 32), (96, 96), (256, 64)])
@pytest.mark.parametrize("tokens", [1, 63])
def test_rotations(tokens: int, dim: int, rotary: int, interleaved: bool, dtype: torch.dtype) -> None:
    both(tokens, dim, Rope(cos_sin=torch.randn(100, 2, rotary // 2), interleaved=interleaved), dtype=dtype)


def test_many_tokens_and_no_rotation() -> None:
    both(1000, 64, None)


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("after_rope", [False, True])
def test_head_norms(after_rope: bool, interleaved: bool, unit_offset: bool) -> None:
    rope = Rope(cos_sin=torch.randn(100, 2, 24), interleaved=interleaved)
    for dtype in (torch.float32, torch.bfloat16):
        both(63, 64, rope, head_norm(64, unit_offset, dtype, after_rope), dtype)


@pytest.mark.parametrize("cache_dtype", FP8)
def test_fp8_cache(cache_dtype: torch.dtype) -> None:
    rope = Rope(cos_sin=torch.randn(100, 2, 32))
    both(63, 64, rope, head_norm(64, False, torch.bfloat16), torch.bfloat16, cache_dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_copy_pages(dtype: torch.dtype) -> None:
    cache = torch.randn(9, 3, 16, 80).to(dtype)
    expected, pairs = cache.clone(), torch.tensor([[3, 1], [8, 0], [3, 4]])
    reference.copy_pages(expected, pairs)
    copy_pages(cache, pairs)
    assert torch.equal(cache.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(cache[4].float(), cache[3].float())


def test_the_reference_is_transformers() -> None:
    from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as neighbours
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as halves

    angles = torch.randn(100, 32)
    table = torch.stack((angles.cos(), angles.sin()), 1)
    q, positions = torch.randn(7, 3, 64), torch.randint(0, 100, (7,))
    both_halves = torch.cat((angles, angles), -1)[positions][None]
    batched = q.transpose(0, 1)[None]
    for expected, rope in (
        (halves(batched, batched, both_halves.cos(), both_halves.sin())[0], Rope(cos_sin=table)),
        (neighbours(batched, batched, both_halves.cos(), both_halves.sin())[0], Rope(cos_sin=table, interleaved=True)),
    ):
        assert_close(reference.rotate(q, positions, rope), expected[0].transpose(0, 1))
