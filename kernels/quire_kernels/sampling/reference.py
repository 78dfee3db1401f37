"""Sampling in plain torch and numpy, with sorting."""

import numpy as np
import torch
from torch import Tensor

from quire_kernels.sampling import Biases, Penalties, Rows
from quire_kernels.sampling.random import philox_uniform


def penalize(logits: Tensor, penalties: Penalties) -> None:
    """See the package's contract."""
    for row, (begin, end) in enumerate(zip(penalties.starts[:-1], penalties.starts[1:], strict=True)):
        tokens, counts = penalties.tokens[begin:end].long(), penalties.counts[begin:end]
        x, repetition = logits[row, tokens], penalties.repetition[row]
        x = torch.where(x > 0, x / repetition, x * repetition)
        x = x - penalties.frequency[row] * counts - penalties.presence[row] * (counts > 0)
        logits[row, tokens] = x


def add_bias(logits: Tensor, biases: Biases) -> None:
    """See the package's contract."""
    for row, (begin, end) in enumerate(zip(biases.starts[:-1], biases.starts[1:], strict=True)):
        logits[row, biases.tokens[begin:end].long()] += biases.values[begin:end]


def mask_logits(logits: Tensor, places: Tensor, masks: Tensor) -> None:
    """See the package's contract."""
    rows = places.long()
    logits[rows] = logits[rows].masked_fill(~allowed(masks, logits.shape[1]), float("-inf"))


def allowed(masks: Tensor, vocabulary: int) -> Tensor:
    """Bits [M, words] → [M, V] bool."""
    return ((masks[..., None] >> torch.arange(32, device=masks.device)) & 1).flatten(1)[:, :vocabulary] == 1


def probabilities(logits: Tensor, rows: Rows) -> Tensor:
    """What `prepare` leaves, [S, V] fp64; all zero where no token is possible, one for the best where greedy."""
    wide = logits.double()
    out = torch.zeros_like(wide)
    for row, x in enumerate(wide):
        if not torch.isfinite(x.max()):
            continue
        if rows.temperature[row] == 0:
            out[row, x.argmax()] = 1.0
            continue
        weights = ((x - x.max()) / rows.temperature[row].double()).exp()
        weights[weights < rows.min_p[row]] = 0.0
        top_k = int(rows.top_k[row])
        if 0 < top_k < len(x):
            weights[weights < weights.topk(top_k).values[-1]] = 0.0
        if rows.top_p[row] < 1:
            ordered = weights.sort(descending=True).values
            wanted = ordered.sum() * rows.top_p[row].double()
            last = int((ordered.cumsum(0) < wanted).sum())
            weights[weights < ordered[last]] = 0.0
        out[row] = weights / weights.sum()
    return out


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """The token of each row of weights [S, V] at uniform [S] of its cumulative sum; -1 where all are zero."""
    cumulative = weights.cumsum(-1)
    found = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return torch.where(cumulative[:, -1] > 0, found, -1).int()


def _uniform(rows: Rows) -> Tensor:
    """[S] fp64 in [0, 1)."""
    seeds, positions = rows.seeds.cpu().numpy().astype(np.uint64), rows.positions.cpu().numpy()
    return torch.from_numpy(philox_uniform(seeds, positions))


def draw(logits: Tensor, rows: Rows) -> Tensor:
    """See the package's contract; prepares by itself."""
    return _invert(probabilities(logits, rows), _uniform(rows))


def token_logprobs(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """See the package's contract."""
    wide = logits.double()
    picked = wide.gather(1, tokens.long()[:, None])
    ranks = (wide > picked).sum(-1) + 1
    return (picked[:, 0] - wide.logsumexp(-1)).float(), ranks.int()
