"""Recurrent layers: the short convolution, the delta rule, Mamba-2's scan."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from case import Built, Case, normal, size
from quire_kernels.recurrence import Gates, StateBatch, reference
from quire_kernels.recurrence.triton import recurrence, short_convolution

Build = Callable[[torch.device, torch.dtype], Built]


@dataclass(frozen=True)
class Heads:
    """A layer's states."""

    heads: int
    groups: int
    rows: int
    columns: int
    delta: bool


QWEN3_NEXT, GRANITE_4 = Heads(32, 16, 128, 128, delta=True), Heads(128, 1, 128, 64, delta=False)


def _batch(device: torch.device, requests: int, tokens: int) -> StateBatch:
    """So many tokens each; states go from the first half of the pages to the second, so that a run can be repeated."""
    pages = torch.arange(2 * requests, dtype=torch.int32, device=device)
    return StateBatch(
        reads=pages[:requests],
        writes=pages[requests:],
        query_starts=torch.arange(requests + 1, dtype=torch.int32, device=device) * tokens,
        requests=torch.arange(requests * tokens, dtype=torch.int32, device=device) // tokens,
        longest_query=tokens,
    )


def _recurrence(shape: Heads, requests: int, tokens: int) -> Build:
    def build(device: torch.device, fp8: torch.dtype) -> Built:
        total = requests * tokens
        q, k = (normal(device, total, shape.groups, shape.rows) for _ in range(2))
        v = normal(device, total, shape.heads, shape.columns)
        dt = normal(device, total, shape.heads)
        beta = normal(device, total, shape.heads) if shape.delta else None
        ones = torch.ones(shape.heads, device=device)
        gates = Gates(decay=-ones, dt_bias=ones, skip=None if shape.delta else ones)
        states = torch.randn(2 * requests, shape.heads, shape.rows, shape.columns, device=device) * 0.1
        batch = _batch(device, requests, tokens)
        # A number of the result sums `rows` products of a state's with a query's, about 1.5 and 1; by the delta rule,
        # whose keys and queries have length 1 and 1 / sqrt(rows), 1 / sqrt(rows) and 1 / rows. Inner factors are
        # rounded to bf16, three times over; of millions of sums some are several times as large as they are commonly.
        result = shape.rows**0.5 * (shape.rows**-1.5 if shape.delta else 1.5)
        return Built(
            run=lambda: recurrence(q, k, v, dt, beta, gates, states, batch),
            expected=lambda: reference.recurrence(q, k, v, dt, beta, gates, states.clone(), batch),
            bytes=size(states) + size(q, k, dt, beta) + 2 * size(v),
            operations=(6 if shape.delta else 4) * states[0].numel() * total,
            terms=3 * result,
        )

    return build


def _convolution(channels: int, requests: int, tokens: int) -> Build:
    def build(device: torch.device, fp8: torch.dtype) -> Built:
        x, weight = normal(device, requests * tokens, channels), normal(device, 4, channels)
        states, batch = normal(device, 2 * requests, 3, channels), _batch(device, requests, tokens)
        return Built(
            run=lambda: short_convolution(x, weight, None, True, states, batch),
            expected=lambda: reference.short_convolution(x, weight, None, True, states.clone(), batch),
            bytes=2 * size(x) + size(states),
        )

    return build


CASES = [
    Case(name="short convolution decode 64 x 8k", build=_convolution(8192, 64, 1)),
    Case(name="short convolution prefill 8k x 8k", build=_convolution(8192, 1, 8192)),
    Case(name="delta rule decode Qwen3-Next 64", build=_recurrence(QWEN3_NEXT, 64, 1)),
    Case(name="delta rule prefill Qwen3-Next 4 x 2k", build=_recurrence(QWEN3_NEXT, 4, 2048)),
    Case(name="scan decode Granite 4 64", build=_recurrence(GRANITE_4, 64, 1)),
    Case(name="scan prefill Granite 4 4 x 2k", build=_recurrence(GRANITE_4, 4, 2048)),
]
