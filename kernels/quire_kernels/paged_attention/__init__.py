"""Attention of new tokens over a paged key-value cache (PagedAttention, Kwon et al. 2023).

Contract, for every implementation: `q` [T, H, D] holds the new tokens of R requests one after the other, request r's
in `q[query_starts[r] : query_starts[r + 1]]`, and these are the last of its `context_lens[r]` tokens. The caches are
[P, K, B, D] (pages, key-value heads, block size, head dim); `block_tables[r]` lists request r's pages in order. Query
head h reads key-value head h // (H // K). The result is [T, H, D]. A token sees itself and what precedes it, at most
`window` tokens in all where `window` > 0. Slots past a request's context are never read into the result.
"""
