"""Paged attention in plain torch: gathers each request's pages and attends. The truth, and the path of last resort."""

import torch
import torch.nn.functional as F
from torch import Tensor


def paged_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_starts: list[int],
    context_lens: list[int],
    scale: float,
    window: int = 0,
) -> Tensor:
    """See the package's contract. Works on any device and dtype; one request at a time."""
    heads, kv_heads, head_dim = q.shape[1], key_cache.shape[1], q.shape[2]
    block_size = key_cache.shape[2]
    out = torch.empty_like(q)
    for r, context in enumerate(context_lens):
        begin, end = query_starts[r], query_starts[r + 1]
        if begin == end:
            continue
        pages = block_tables[r, : -(-context // block_size)].long()
        keys = key_cache[pages].transpose(0, 1).reshape(kv_heads, -1, head_dim)[:, :context]
        values = value_cache[pages].transpose(0, 1).reshape(kv_heads, -1, head_dim)[:, :context]
        query_at = torch.arange(context - (end - begin), context, device=q.device)[:, None]
        key_at = torch.arange(context, device=q.device)[None, :]
        visible = key_at <= query_at
        if window > 0:
            visible &= key_at > query_at - window
        attended = F.scaled_dot_product_attention(
            q[begin:end].transpose(0, 1)[None],
            keys.repeat_interleave(heads // kv_heads, 0)[None],
            values.repeat_interleave(heads // kv_heads, 0)[None],
            attn_mask=visible,
            scale=scale,
        )
        out[begin:end] = attended[0].transpose(0, 1)
    return out
