"""FlashAttention 3 (Shah et al. 2024) over the paged cache, where its package is installed: it has what plain Triton
has not (asynchronous loads, warps with roles of their own), which pays for long prompts."""

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from quire_kernels.backends import AttentionBatch
from quire_kernels.paged_attention import AttentionOptions

MODULE = "flash_attn_interface"  # of the package built from its hopper/ folder
CHIPS = ("sm_90",)
LEAST_TOKENS = 513  # new tokens of the longest request: shorter steps are captured as graphs, with Triton's kernel
_MOST_HEAD_DIM = 256


def load() -> Callable[..., Tensor] | None:
    """The library's function; None where it is not installed."""
    try:
        found: Callable[..., Tensor] = importlib.import_module(MODULE).flash_attn_with_kvcache
    except ImportError:
        return None
    return found


def fits(q: Tensor, key_cache: Tensor, batch: AttentionBatch, options: AttentionOptions) -> bool:
    """Whether the library computes it, and is the faster one: by shapes and the model's options, never by values."""
    extras = (options.sinks, options.alibi_slopes, options.spans, options.key_scale, options.value_scale)
    return (
        batch.longest_query >= LEAST_TOKENS
        and q.element_size() == 2
        and key_cache.dtype == q.dtype
        and q.shape[-1] <= _MOST_HEAD_DIM
        and all(extra is None for extra in extras)
    )


def attend(
    function: Callable[..., Any],
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    options: AttentionOptions,
) -> Tensor:
    """See the package's contract. The library wants pages as [pages, block, heads, dim], and takes any strides."""
    out: Tensor = function(
        q,
        key_cache.transpose(1, 2),
        value_cache.transpose(1, 2),
        cache_seqlens=batch.context_lens,
        page_table=batch.block_tables,
        cu_seqlens_q=batch.query_starts,
        max_seqlen_q=batch.longest_query,
        softmax_scale=scale,
        causal=True,
        window_size=(options.window - 1, 0) if options.window > 0 else (-1, -1),
        softcap=options.soft_cap,
    )
    return out
