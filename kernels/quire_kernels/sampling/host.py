"""`draw` of the package's contract on a CPU, with torch's operators: each row costs what its own parameters ask for."""

import numpy as np
import torch
from torch import Tensor

from quire_kernels.sampling import Rows
from quire_kernels.sampling.random import philox_uniform

_CANDIDATES = 1024  # top-p looks at so many before it sorts the whole vocabulary


def draw(logits: Tensor, rows: Rows) -> Tensor:
    """See the package's contract. logits [S, V] fp32 → [S] int32."""
    best, greedy = logits.max(-1)
    tokens = torch.where(torch.isfinite(best), greedy, -1).to(torch.int32)
    random = ((rows.temperature > 0) & (tokens >= 0)).nonzero()[:, 0]
    if random.numel() == len(tokens):
        return _draw_random(logits, best, rows)
    if random.numel():
        part = Rows(
            temperature=rows.temperature[random],
            top_k=rows.top_k[random],
            top_p=rows.top_p[random],
            min_p=rows.min_p[random],
            seeds=rows.seeds[random],
            positions=rows.positions[random],
        )
        tokens[random] = _draw_random(logits[random], best[random], part)
    return tokens


def _draw_random(logits: Tensor, best: Tensor, rows: Rows) -> Tensor:
    """logits [N, V], best [N] their maxima. Weights are e^((l - max) / temperature): the likeliest token has 1."""
    weights = ((logits - best[:, None]) / rows.temperature[:, None]).exp_()  # [N, V]
    if rows.min_p.any():
        weights.masked_fill_(weights < rows.min_p[:, None], 0.0)
    top_k, top_p = rows.top_k.numpy(), rows.top_p.numpy()
    for place in np.flatnonzero((top_k > 0) & (top_k < logits.shape[1])):
        least = weights[place].topk(int(top_k[place])).values[-1]
        weights[place].masked_fill_(weights[place] < least, 0.0)
    for place in np.flatnonzero(top_p < 1.0):
        least = nucleus_edge(weights[place], float(top_p[place]))
        weights[place].masked_fill_(weights[place] < least, 0.0)
    cumulative = weights.cumsum(-1)
    uniform = torch.from_numpy(philox_uniform(rows.seeds.numpy().view(np.uint64), rows.positions.numpy()))
    target = (uniform * cumulative[:, -1].double()).float()[:, None]
    # The product may round up to the total; then the search ends past the last possible token.
    target = torch.minimum(target, torch.nextafter(cumulative[:, -1:], torch.zeros_like(target)))
    return torch.searchsorted(cumulative, target, right=True)[:, 0].to(torch.int32)


def nucleus_edge(weights: Tensor, top_p: float) -> Tensor:
    """The smallest of the weights [V] in the nucleus: the fewest likeliest tokens that make up `top_p` (Holtzman et
    al. 2020)."""
    wanted = weights.sum() * top_p
    count = min(_CANDIDATES, weights.shape[0])
    ordered = weights.topk(count).values
    cumulative = ordered.cumsum(-1)
    if cumulative[-1] < wanted and count < weights.shape[0]:
        ordered = weights.sort(descending=True).values
        cumulative = ordered.cumsum(-1)
    last = int((cumulative < wanted).sum())
    return ordered[min(last, ordered.shape[0] - 1)]
