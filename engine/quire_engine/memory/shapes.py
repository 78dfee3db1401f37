"""The padded shapes of steps that are captured as graphs (execution/graphs.py), which the plan of memory counts.

Decoding is captured at a ladder of batch sizes; small steps that mix prompts with decoding, and steps with drafts, at
ladders of token counts.
"""

from quire_engine.batch import Shape
from quire_engine.config import SchedulerLimits

MIXED_TOKENS = (16, 32, 64, 128, 256, 512)
_MIXED_REQUESTS = (32, 128, 256)


def decode_ladder(most: int) -> list[int]:
    """Batch sizes to capture: fine where a step is short, in steps of at most an eighth above."""
    sizes, size = [1, 2, 4], 8
    while size < most:
        sizes.append(size)
        size += 8 if size < 64 else size // 8 // 8 * 8
    return sorted({min(size, most) for size in [*sizes, most]})


def mixed_ladder(most_tokens: int, most_requests: int) -> list[Shape]:
    """Shapes of small steps with prompts in them. One request more than can come holds the padding.

    `most_tokens`: no more than a request may have, for the padding may be all.
    """
    return [
        Shape(tokens, requests + 1, requests, tokens)
        for tokens in MIXED_TOKENS
        if tokens <= most_tokens
        for requests in sorted({min(size, most_requests) for size in _MIXED_REQUESTS})
        if requests < tokens or requests <= _MIXED_REQUESTS[0]
    ]


def drafted_ladder(most_draws: int, longest: int) -> list[Shape]:
    """Shapes of steps that decode with drafts, where every token is drawn behind. `longest`: tokens of a request.

    There may be as many requests as tokens, so that no padding request is longer.
    """
    sizes = [2, 4, 8, 12, *(size for size in decode_ladder(most_draws) if size >= 16)]
    return [Shape(size, size + 1, size, longest) for size in sizes if size <= most_draws]


def largest_shapes(limits: SchedulerLimits) -> list[Shape]:
    """Of the steps that can be, those that take most: with prompts, and with drafts, of which none are beside prompts
    (but beside tokens that are computed again from a state)."""
    tokens, rows = limits.most_tokens, limits.most_rows
    shapes = [Shape(tokens, rows, rows, tokens)]
    draws = limits.most_draws
    if limits.num_states and draws > rows:
        shapes.append(Shape(tokens, rows, draws, tokens))
    elif draws > rows:
        shapes.append(Shape(draws, draws + 1, draws, 1 + limits.drafts_of_one))
    return shapes


def captured_shapes(limits: SchedulerLimits) -> list[Shape]:
    """All that are captured, the one that takes most first."""
    decoding = [Shape(size, size, size, 1) for size in decode_ladder(limits.most_rows)]
    mixed = mixed_ladder(min(limits.max_num_batched_tokens, limits.max_model_len), limits.most_rows)
    drafted = drafted_ladder(limits.most_draws, 1 + limits.drafts_of_one) if limits.drafts_of_one else []
    return sorted(decoding + mixed + drafted, key=lambda shape: (-shape.tokens, -shape.requests))
