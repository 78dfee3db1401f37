"""Paged batches for tests: pages scattered, everything that may not be read poisoned."""

import math

import numpy as np
import torch
from quire_kernels.backends import AttentionBatch


def make_batch(queries: list[int], contexts: list[int], block_size: int, num_pages: int) -> AttentionBatch:
    """Request r has contexts[r] tokens, the last queries[r] of them new; its pages are random ones."""
    starts = np.concatenate(([0], np.cumsum(queries))).astype(np.int32)
    width = max(-(-c // block_size) for c in contexts)
    free = torch.randperm(num_pages).tolist()
    tables = torch.full((len(queries), width), num_pages - 1, dtype=torch.int32)
    positions, slots = [], []
    for r, (count, context) in enumerate(zip(queries, contexts, strict=True)):
        pages = [free.pop() for _ in range(-(-context // block_size))]
        tables[r, : len(pages)] = torch.tensor(pages)
        for position in range(context - count, context):
            positions.append(position)
            slots.append(pages[position // block_size] * block_size + position % block_size)
    return AttentionBatch(
        positions=torch.tensor(positions, dtype=torch.int32),
        slots=torch.tensor(slots),
        block_tables=tables,
        query_starts=torch.from_numpy(starts),
        longest_query=max(queries),
        context_lens=torch.tensor(contexts, dtype=torch.int32),
    )


def poisoned(batch: AttentionBatch, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A cache [P, K, B, D], NaN everywhere but in the slots of the requests' contexts."""
    cache = torch.full(shape, math.nan).to(dtype)
    for r, context in enumerate(batch.context_lens.tolist()):
        for page_place in range(-(-context // shape[2])):
            filled = min(shape[2], context - page_place * shape[2])
            page = int(batch.block_tables[r, page_place])
            fresh = torch.randn(shape[1], filled, shape[3]).to(dtype)
            cache.view(torch.uint8 if dtype.itemsize == 1 else dtype)[page, :, :filled] = (
                fresh.view(torch.uint8) if dtype.itemsize == 1 else fresh
            )
    return cache
