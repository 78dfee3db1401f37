"""Recurrent layers in plain torch, a token at a time."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from quire_kernels.recurrence import NORM_EPS, Gates, StateBatch


def _requests(states: Tensor, batch: StateBatch) -> Iterator[tuple[slice, Tensor, int]]:
    """Each request's tokens, the state it starts from, and the page it writes."""
    starts = batch.query_starts.tolist()
    for request, (page, target) in enumerate(zip(batch.reads.tolist(), batch.writes.tolist(), strict=True)):
        state = states[page].clone() if page >= 0 else torch.zeros_like(states[0])
        yield slice(starts[request], starts[request + 1]), state, target


def short_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, states: Tensor, batch: StateBatch
) -> Tensor:
    """See the package's contract."""
    width = weight.shape[0]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for tokens, state, target in _requests(states, batch):
        inputs = torch.cat((state.to(x.dtype), x[tokens]))
        count = tokens.stop - tokens.start
        sums = torch.zeros(count, x.shape[1], device=x.device) if bias is None else bias.float().expand(count, -1)
        for i in range(width):
            sums = sums + inputs[i : i + count].float() * weight[i].float()
        out[tokens] = (F.silu(sums) if silu else sums).to(x.dtype)
        states[target] = inputs[inputs.shape[0] - width + 1 :].to(states.dtype)
    return out


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, dt: Tensor, beta: Tensor | None, gates: Gates, states: Tensor, batch: StateBatch
) -> Tensor:
    """See the package's contract."""
    heads = v.shape[1]
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    step = F.softplus(dt.float() + gates.dt_bias).clamp(*gates.limits)  # [T, H]
    fade = torch.exp(gates.decay * step)
    query, key = (x.float().repeat_interleave(heads // x.shape[1], 1) for x in (q, k))
    value = v.float()
    if beta is not None:
        query, key = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS) for x in (query, key))
        query = query * q.shape[-1] ** -0.5
        rate = beta.float().sigmoid()
    for tokens, state, target in _requests(states, batch):
        for t in range(tokens.start, tokens.stop):
            state = state * fade[t, :, None, None]
            if beta is None:
                added = value[t] * step[t, :, None]
            else:
                added = (value[t] - torch.einsum("hdp,hd->hp", state, key[t])) * rate[t, :, None]
            state = state + key[t, :, :, None] * added[:, None, :]
            read = torch.einsum("hdp,hd->hp", state, query[t])
            if gates.skip is not None:
                read = read + gates.skip[:, None] * value[t]
            out[t] = read.to(v.dtype)
        states[target] = state
    return out
