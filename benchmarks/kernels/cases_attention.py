"""Attention and what writes its cache."""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from case import Built, Case, normal, size
from quire_kernels.cache_write import CacheScales, HeadNorm, Rope
from quire_kernels.cache_write import reference as write_reference
from quire_kernels.cache_write.triton import copy_pages, rope_cache_write
from quire_kernels.mla import reference as mla_reference
from quire_kernels.mla.triton import latent_attention, latent_cache_write
from quire_kernels.paged_attention import PLAIN, AttentionOptions, reference
from quire_kernels.paged_attention.triton import paged_attention
from torch import Tensor


@dataclass(frozen=True)
class Heads:
    """What attention sees of a model, on one rank."""

    query: int
    kv: int
    dim: int = 128


_PEAK = 2.0  # how much queries are scaled up: scores of a standard deviation of 1 make all keys of a context alike
LLAMA_8B, LLAMA_70B_TP8, QWEN3_30B = Heads(32, 8), Heads(8, 1), Heads(32, 4)
Options = Callable[[torch.device, Heads, int], AttentionOptions]


def _size_of_result(queries: list[int], contexts: list[int], window: int) -> float:
    """Root mean square of what attention gives where keys are fewest: tolerances follow it, or at a long context a
    part of the keys could be lost unseen. Weights are exponentials of normal scores, values normal."""
    keys = min(c - n + 1 for n, c in zip(queries, contexts, strict=True))
    return min(1.0, math.sqrt(math.exp(_PEAK**2) / (min(keys, window) if window else keys)))


def _pages(device: torch.device, contexts: list[int], block: int) -> tuple[int, Tensor]:
    """How many pages there are, and block tables of random ones."""
    counts = [-(-context // block) for context in contexts]
    tables = torch.zeros(len(contexts), max(counts), dtype=torch.int32, device=device)
    order = torch.randperm(sum(counts), dtype=torch.int32, device=device)
    for row, found in zip(tables, order.split(counts), strict=True):
        row[: len(found)] = found
    return sum(counts), tables


def _attention(
    heads: Heads,
    queries: list[int],
    contexts: list[int],
    block: int,
    fp8_cache: bool = False,
    invariant: bool = False,
    options: Options = lambda *_: PLAIN,
) -> Callable[[torch.device, torch.dtype], Built]:
    def build(device: torch.device, fp8: torch.dtype) -> Built:
        pages, tables = _pages(device, contexts, block)
        shape, dtype = (pages, heads.kv, block, heads.dim), fp8 if fp8_cache else torch.bfloat16
        keys, values = normal(device, *shape, dtype=dtype), normal(device, *shape, dtype=dtype)
        starts = [sum(queries[:i]) for i in range(len(queries) + 1)]
        on_device = [torch.tensor(x, dtype=torch.int32, device=device) for x in (starts, contexts)]
        q = normal(device, starts[-1], heads.query, heads.dim, scale=_PEAK)
        chosen = options(device, heads, starts[-1])
        if fp8_cache:
            scales = torch.rand(2, heads.kv, device=device) / 2 + 0.5
            chosen = replace(chosen, key_scale=scales[0], value_scale=scales[1])
        scale = heads.dim**-0.5
        seen = [min(c, chosen.window + n) if chosen.window else c for n, c in zip(queries, contexts, strict=True)]
        pairs = sum(n * (s - (n - 1) / 2) for n, s in zip(queries, seen, strict=True))
        peers: dict[str, Callable[[], Any]] = {}
        if device.type == "cuda" and chosen == PLAIN and len(set(zip(queries, contexts, strict=True))) == 1:
            peers = _peers(q, keys, values, tables, len(contexts), queries[0], contexts[0], scale)
        return Built(
            run=lambda: paged_attention(
                q, keys, values, tables, *on_device, max(queries), scale, chosen, invariant=invariant
            ),
            expected=lambda: reference.attention_with_lse(q.float(), keys, values, tables, *on_device, scale, chosen)[
                0
            ],
            bytes=2 * sum(seen) * heads.kv * heads.dim * keys.element_size() + 2 * size(q),
            operations=4 * pairs * heads.query * heads.dim,
            terms=_size_of_result(queries, contexts, chosen.window),
            peers=peers,
        )

    return build


def _peers(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, requests: int, new: int, context: int, scale: float
) -> dict[str, Callable[[], Any]]:
    """torch's attention over contiguous keys and values; FlashAttention and FlashInfer where they are installed."""
    dense = [
        cache[tables.long()].transpose(1, 2).flatten(2, 3)[:, :, :context].contiguous() for cache in (keys, values)
    ]
    dense_q = q.view(requests, new, *q.shape[1:]).transpose(1, 2).contiguous()
    causal = new == context
    peers = {
        "sdpa": lambda: F.scaled_dot_product_attention(dense_q, *dense, is_causal=causal, scale=scale, enable_gqa=True)
    }
    if causal:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        compiled, masks = torch.compile(flex_attention), []

        def flex() -> Tensor:
            if not masks:  # here, where what fails is the peer's failure
                masks.append(create_block_mask(lambda b, h, i, j: i >= j, None, None, new, context, device="cuda"))
            return compiled(dense_q, *dense, block_mask=masks[0], scale=scale, enable_gqa=True)

        peers["flex"] = flex
    if importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_func

        token_first = [x.transpose(1, 2).contiguous() for x in (dense_q, *dense)]
        peers["flash_attn"] = lambda: flash_attn_func(*token_first, softmax_scale=scale, causal=causal)
    if new == 1 and importlib.util.find_spec("flashinfer"):
        import flashinfer

        workspace = torch.empty(128 << 20, dtype=torch.uint8, device="cuda")
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND")
        block, width = keys.shape[2], tables.shape[1]
        wrapper.plan(
            torch.arange(requests + 1, dtype=torch.int32, device="cuda") * width,
            tables.flatten(),
            torch.full((requests,), (context - 1) % block + 1, dtype=torch.int32, device="cuda"),
            q.shape[1],
            keys.shape[1],
            q.shape[2],
            block,
            q_data_type=q.dtype,
        )
        peers["flashinfer"] = lambda: wrapper.run(q, (keys, values))
    return peers


def _spans(device: torch.device, heads: Heads, tokens: int) -> AttentionOptions:
    spans = torch.zeros(tokens, 2, dtype=torch.int32, device=device)
    spans[256:512] = torch.tensor([256, 512], dtype=torch.int32, device=device)
    return AttentionOptions(spans=spans, window=1024)


def _alibi(device: torch.device, heads: Heads, tokens: int) -> AttentionOptions:
    return AttentionOptions(alibi_slopes=torch.rand(heads.query, device=device))


def _gpt_oss(device: torch.device, heads: Heads, tokens: int) -> AttentionOptions:
    return AttentionOptions(sinks=torch.randn(heads.query, device=device), window=128)


def _gemma2(device: torch.device, heads: Heads, tokens: int) -> AttentionOptions:
    return AttentionOptions(soft_cap=50.0, window=4096)


def _latent(heads: int, queries: list[int], contexts: list[int]) -> Callable[[torch.device, torch.dtype], Built]:
    def build(device: torch.device, fp8: torch.dtype) -> Built:
        pages, tables = _pages(device, contexts, 64)
        cache = normal(device, pages, 64, 576)
        starts = [sum(queries[:i]) for i in range(len(queries) + 1)]
        on_device = [torch.tensor(x, dtype=torch.int32, device=device) for x in (starts, contexts)]
        q = normal(device, starts[-1], heads, 576, scale=_PEAK)
        pairs = sum(n * (c - (n - 1) / 2) for n, c in zip(queries, contexts, strict=True))
        return Built(
            run=lambda: latent_attention(q, cache, tables, *on_device, 576**-0.5, 512),
            expected=lambda: mla_reference.latent_attention(q.float(), cache, tables, *on_device, 576**-0.5, 512)[0],
            bytes=sum(contexts) * 576 * 2 + size(q) * (1 + 512 / 576),
            operations=2 * pairs * heads * (576 + 512),
            terms=_size_of_result(queries, contexts, 0),
        )

    return build


def _cache_write(
    heads: Heads,
    tokens: int,
    norm: bool = False,
    norm_last: bool = False,
    interleaved: bool = False,
    fp8_cache: bool = False,
) -> Callable[[torch.device, torch.dtype], Built]:
    def build(device: torch.device, fp8: torch.dtype) -> Built:
        pages = -(-tokens // 64) + 1
        shape, dtype = (pages, heads.kv, 64, heads.dim), fp8 if fp8_cache else torch.bfloat16
        qkv = normal(device, tokens, (heads.query + 2 * heads.kv) * heads.dim)
        positions = torch.arange(tokens, device=device, dtype=torch.int32)
        rope = Rope(cos_sin=torch.randn(tokens, 2, heads.dim // 2, device=device), interleaved=interleaved)
        slots = torch.randperm(pages * 64, device=device)[:tokens]
        weights = {name: normal(device, heads.dim) for name in ("q_weight", "k_weight")}
        head_norm = HeadNorm(**weights, eps=1e-6, after_rope=norm_last) if norm or norm_last else None
        scales = None
        if fp8_cache:
            scales = CacheScales(**{name: torch.ones(heads.kv, device=device) for name in ("key", "value")})
        caches = [torch.zeros(shape, device=device, dtype=torch.bfloat16).to(dtype) for _ in range(2)]

        def run() -> tuple[Tensor, Tensor]:
            rope_cache_write(qkv, *caches, positions, slots, heads.query, rope, head_norm, scales)
            return caches[0], caches[1]

        def expected() -> tuple[Tensor, Tensor]:  # q is turned by every run: the caches alone are compared
            fresh = [torch.zeros_like(cache) for cache in caches]
            again = qkv.clone()
            write_reference.rope_cache_write(again, *fresh, positions, slots, heads.query, rope, head_norm, scales)
            return fresh[0], fresh[1]

        written = 2 * tokens * heads.kv * heads.dim * caches[0].element_size()
        moved = size(qkv) + tokens * heads.query * heads.dim * 2 + written + tokens * heads.dim * 4
        return Built(run=run, expected=expected, bytes=moved)

    return build


def _latent_write(device: torch.device, fp8: torch.dtype) -> Built:
    tokens, heads = 8192, 16
    latent, q = normal(device, tokens, 576), normal(device, tokens, heads, 192)
    cache = torch.zeros(tokens // 64, 64, 576, device=device, dtype=torch.bfloat16)
    positions, slots = torch.arange(tokens, device=device).int(), torch.randperm(tokens, device=device)
    cos_sin, weight = torch.randn(tokens, 2, 32, device=device), normal(device, 512)

    def run() -> Tensor:
        latent_cache_write(latent, q[..., 128:], cache, positions, slots, cos_sin, weight, 1e-6)
        return cache

    def expected() -> Tensor:
        fresh, again = torch.zeros_like(cache), q.clone()
        mla_reference.latent_cache_write(latent, again[..., 128:], fresh, positions, slots, cos_sin, weight, 1e-6)
        return fresh

    return Built(run=run, expected=expected, bytes=2 * size(latent) + 2 * tokens * heads * 64 * 2)


def _copy_pages(device: torch.device, fp8: torch.dtype) -> Built:
    cache = normal(device, 1024, 8, 64, 128)
    pairs = torch.arange(1024, device=device).view(2, -1).T.contiguous()

    def run() -> Tensor:
        copy_pages(cache, pairs)
        return cache

    def expected() -> Tensor:
        copied = cache.clone()
        copied[512:] = copied[:512]
        return copied

    return Built(run=run, expected=expected, bytes=size(cache))


def _decode(heads: Heads, requests: int, context: int, block: int = 64, **more: Any) -> Any:
    return _attention(heads, [1] * requests, [context] * requests, block, **more)


def _prefill(heads: Heads, tokens: int, block: int = 64, **more: Any) -> Any:
    return _attention(heads, [tokens], [tokens], block, **more)


CASES = [
    Case(name="decode Llama-3-8B 64 x 4k, block 64", build=_decode(LLAMA_8B, 64, 4096), streams=True),
    Case(name="decode Llama-3-8B 64 x 4k, block 16", build=_decode(LLAMA_8B, 64, 4096, 16), streams=True),
    Case(
        name="decode Llama-3-8B 64 x 4k, fp8 cache",
        build=_decode(LLAMA_8B, 64, 4096, fp8_cache=True),
        needs_fp8=True,
    ),
    Case(name="decode Llama-3-8B 64 x 4k, batch-invariant", build=_decode(LLAMA_8B, 64, 4096, invariant=True)),
    Case(name="decode Llama-3-8B 1 x 32k", build=_decode(LLAMA_8B, 1, 32768), streams=True),
    Case(
        name="decode Llama-3-8B 1 x 100k + 63 x 1k",
        build=_attention(LLAMA_8B, [1] * 64, [100_000] + [1024] * 63, 64),
        streams=True,
    ),
    Case(name="decode Llama-3-70B/8 64 x 4k", build=_decode(LLAMA_70B_TP8, 64, 4096), streams=True),
    Case(name="decode Qwen3-30B-A3B 64 x 4k", build=_decode(QWEN3_30B, 64, 4096), streams=True),
    Case(name="verify 5 tokens Llama-3-8B 16 x 4k", build=_attention(LLAMA_8B, [5] * 16, [4096] * 16, 64)),
    Case(name="prefill Llama-3-8B 8k", build=_prefill(LLAMA_8B, 8192)),
    Case(name="prefill Llama-3-8B 4k, block 16", build=_prefill(LLAMA_8B, 4096, 16)),
    Case(
        name="chunk of 2k beside 32 decoding, Llama-3-8B",
        build=_attention(LLAMA_8B, [2048] + [1] * 32, [6144] + [2048] * 32, 64),
    ),
    Case(name="suffix of 128 on 32k, Llama-3-8B", build=_attention(LLAMA_8B, [128], [32768], 64)),
    Case(name="prefill 2k, fp8 cache", build=_prefill(LLAMA_8B, 2048, fp8_cache=True), needs_fp8=True, timed=False),
    Case(
        name="prefill hd 256, soft-cap, window", build=_prefill(Heads(16, 8, 256), 2048, options=_gemma2), timed=False
    ),
    Case(
        name="decode hd 256, soft-cap, window", build=_decode(Heads(16, 8, 256), 8, 8192, options=_gemma2), timed=False
    ),
    Case(name="prefill hd 64, sinks, window", build=_prefill(Heads(64, 8, 64), 2048, options=_gpt_oss), timed=False),
    Case(name="decode hd 64, sinks, window", build=_decode(Heads(64, 8, 64), 8, 2048, options=_gpt_oss), timed=False),
    Case(name="prefill hd 80", build=_prefill(Heads(32, 32, 80), 1024), timed=False),
    Case(name="prefill hd 96, ALiBi", build=_prefill(Heads(32, 32, 96), 1024, options=_alibi), timed=False),
    Case(name="prefill hd 192", build=_prefill(Heads(16, 16, 192), 1024), timed=False),
    Case(name="prefill image spans", build=_prefill(Heads(8, 4, 256), 1024, options=_spans), timed=False),
    Case(name="MLA decode DeepSeek-V3/8 64 x 4k", build=_latent(16, [1] * 64, [4096] * 64), streams=True),
    Case(name="MLA decode DeepSeek-V3 8 x 4k", build=_latent(128, [1] * 8, [4096] * 8)),
    Case(name="MLA suffix of 32 on 16k, DeepSeek-V3", build=_latent(128, [32], [16384])),
    Case(name="MLA prefill DeepSeek-V3/8 2k", build=_latent(16, [2048], [2048])),
    Case(name="cache write Llama-3-8B 8k", build=_cache_write(LLAMA_8B, 8192), streams=True),
    Case(
        name="cache write Hunyuan 8k, head norms after the rotation",
        build=_cache_write(LLAMA_8B, 8192, norm_last=True),
        timed=False,
    ),
    Case(name="cache write Qwen3 8k, head norms", build=_cache_write(QWEN3_30B, 8192, norm=True), streams=True),
    Case(
        name="cache write Llama-3-8B 8k, fp8 cache",
        build=_cache_write(LLAMA_8B, 8192, fp8_cache=True),
        needs_fp8=True,
        streams=True,
    ),
    Case(name="cache write, interleaved", build=_cache_write(LLAMA_8B, 1024, interleaved=True), timed=False),
    Case(name="MLA cache write 8k", build=_latent_write, streams=True),
    Case(name="copy 512 pages", build=_copy_pages, streams=True),
]
