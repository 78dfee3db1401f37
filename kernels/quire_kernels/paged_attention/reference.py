"""Paged attention in plain torch: gathers each request's pages and attends. The truth, and the path of last resort."""

import torch
import torch.nn.functional as F
from torch import Tensor

from quire_kernels.paged_attention import PLAIN, AttentionOptions


def _visible(context: int, count: int, options: AttentionOptions, spans: Tensor | None, device: torch.device) -> Tensor:
    """Which keys each of the last `count` tokens sees, [count, context]."""
    query_at = torch.arange(context - count, context, device=device)[:, None]
    key_at = torch.arange(context, device=device)[None, :]
    visible = key_at <= query_at
    if options.window > 0:
        visible &= key_at > query_at - options.window
    if spans is not None:
        visible |= (key_at >= spans[:, :1]) & (key_at < spans[:, 1:])
    return visible


def gather(cache: Tensor, pages: Tensor, context: int, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The first `context` slots of the pages, [K, context, D], times `scale` [K]."""
    kv_heads, head_dim = cache.shape[1], cache.shape[3]
    raw = cache.view(torch.uint8)[pages].view(cache.dtype) if cache.element_size() == 1 else cache[pages]
    found = raw.transpose(0, 1).reshape(kv_heads, -1, head_dim)[:, :context]
    if scale is None:
        return found.to(dtype)
    return (found.float() * scale[:, None, None]).to(dtype)


def paged_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
    options: AttentionOptions = PLAIN,
) -> Tensor:
    """See the package's contract. Works on any device and dtype; one request at a time."""
    if options.soft_cap or options.sinks is not None or options.alibi_slopes is not None:
        return attention_with_lse(q, key_cache, value_cache, block_tables, query_starts, context_lens, scale, options)[
            0
        ]
    group = q.shape[1] // key_cache.shape[1]
    out = torch.empty_like(q)
    starts = query_starts.tolist()
    for r, context in enumerate(context_lens.tolist()):
        begin, end = starts[r], starts[r + 1]
        if begin == end:
            continue
        pages = block_tables[r, : -(-context // key_cache.shape[2])].long()
        spans = None if options.spans is None else options.spans[begin:end]
        attended = F.scaled_dot_product_attention(
            q[begin:end].transpose(0, 1)[None],
            gather(key_cache, pages, context, options.key_scale, q.dtype).repeat_interleave(group, 0)[None],
            gather(value_cache, pages, context, options.value_scale, q.dtype).repeat_interleave(group, 0)[None],
            attn_mask=_visible(context, end - begin, options, spans, q.device),
            scale=scale,
        )
        out[begin:end] = attended[0].transpose(0, 1)
    return out


def attention_with_lse(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
    options: AttentionOptions = PLAIN,
) -> tuple[Tensor, Tensor]:
    """As `paged_attention`, with the log-sum-exp [T, H]; written out, in fp32 or wider."""
    heads, kv_heads = q.shape[1], key_cache.shape[1]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=wide, device=q.device)
    starts = query_starts.tolist()
    for r, context in enumerate(context_lens.tolist()):
        begin, end = starts[r], starts[r + 1]
        if begin == end:
            continue
        pages = block_tables[r, : -(-context // key_cache.shape[2])].long()
        keys = gather(key_cache, pages, context, options.key_scale, wide)
        values = gather(value_cache, pages, context, options.value_scale, wide)
        queries = q[begin:end].to(wide).unflatten(1, (kv_heads, heads // kv_heads))
        scores = torch.einsum("tkgd,kcd->kgtc", queries, keys).flatten(0, 1) * scale  # [H, tokens, context]
        if options.soft_cap:
            scores = options.soft_cap * torch.tanh(scores / options.soft_cap)
        if options.alibi_slopes is not None:
            query_at = torch.arange(context - (end - begin), context, device=q.device)[:, None]
            distance = query_at - torch.arange(context, device=q.device)[None, :]
            scores = scores - options.alibi_slopes[:, None, None] * distance
        spans = None if options.spans is None else options.spans[begin:end]
        visible = _visible(context, end - begin, options, spans, q.device)
        scores = scores.masked_fill(~visible, float("-inf"))
        if options.sinks is not None:
            sinks = options.sinks.to(wide)[:, None, None].expand(heads, end - begin, 1)
            scores = torch.cat((scores, sinks), -1)
        normalizer = scores.logsumexp(-1)
        weights = (scores - normalizer[..., None]).exp()[..., :context].unflatten(0, (kv_heads, -1))
        out[begin:end] = torch.einsum("kgtc,kcd->tkgd", weights, values).flatten(1, 2).to(q.dtype)
        lse[begin:end] = normalizer.T
    return out, lse


def merge(parts: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Partial results [S, T, H, D] over disjoint keys with their log-sum-exps [S, T, H] → [T, H, D] and [T, H]."""
    total = lse.logsumexp(0)
    seen = lse > float("-inf")
    weights = (lse - torch.where(seen.any(0), total, 0.0)).exp()
    return torch.where(seen[..., None], parts.to(lse.dtype) * weights[..., None], 0.0).sum(0).to(parts.dtype), total
