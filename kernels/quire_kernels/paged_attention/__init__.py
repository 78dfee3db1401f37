"""Attention of new tokens over a paged key-value cache (PagedAttention, Kwon et al. 2023).

Contract, for every implementation: `q` [T, H, D] holds the new tokens of R requests one after the other, request r's
in `q[query_starts[r] : query_starts[r + 1]]`, and these are the last of its `context_lens[r]` tokens. The caches are
[P, K, B, D] (pages, key-value heads, block size, head dim); `block_tables[r]` lists request r's pages in order. Query
head h reads key-value head h // (H // K). The result is [T, H, D]. A token sees itself and what precedes it, at most
`window` tokens in all where `window` > 0. Slots past a request's context are never read into the result.

`AttentionOptions` holds what families add to that. Where a log-sum-exp is asked for it is [T, H] in fp32, of natural
logarithms; partial results over disjoint keys merge with it (`merge`).
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionOptions:
    """The default of each leaves plain causal attention."""

    window: int = 0  # tokens that a token sees, itself included; 0: all
    soft_cap: float = 0.0  # scores become cap * tanh(score / cap) (Gemma 2); 0: none
    sinks: Tensor | None = None  # [H] fp32 logits that take part in the softmax and carry no value (gpt-oss)
    alibi_slopes: Tensor | None = None  # [H] fp32: score -= slope * distance (Press et al. 2022)
    spans: Tensor | None = None  # [T, 2] int32 (begin, end): positions, its own among them, that a token sees besides
    key_scale: Tensor | None = None  # [K] fp32: what a stored key is multiplied by; equal ones are a scale per tensor
    value_scale: Tensor | None = None  # [K] fp32


PLAIN = AttentionOptions()
