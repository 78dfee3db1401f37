"""Recurrent layers in Triton. A head's state stays in registers while its tokens pass: one by one when decoding, which
is the reading and writing of states; prompts in chunks, by products of matrices."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels.recurrence import NORM_EPS, Gates, StateBatch

_CHANNELS = 256
_TOKENS = 16  # of one tile of the convolution
_CHUNK = 16  # the least that a product of matrices takes; the triangular system in it is as long


@triton.jit(do_not_specialize=["num_tokens"])
def _convolve(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    states_ptr,
    reads_ptr,
    query_starts_ptr,
    requests_ptr,
    x_stride: tl.int64,
    num_tokens,
    C: tl.constexpr,
    K: tl.constexpr,
    SILU: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    token_in = token < num_tokens
    channel_in = channel < C
    inside = token_in[:, None] & channel_in[None, :]
    request = tl.load(requests_ptr + token, mask=token_in, other=0)
    local = token - tl.load(query_starts_ptr + request, mask=token_in, other=0)  # place within its request
    page = tl.load(reads_ptr + request, mask=token_in, other=-1).to(tl.int64)
    sums = tl.zeros((TOKENS, CHANNELS), tl.float32)
    for back in tl.static_range(K):
        new = inside & (local >= back)[:, None]
        at = (token - back).to(tl.int64)
        value = tl.load(x_ptr + at[:, None] * x_stride + channel[None, :], mask=new, other=0.0).to(tl.float32)
        if back > 0:
            old = inside & ((local < back) & (page >= 0))[:, None]
            place = (page * (K - 1) + K - 1 + local - back) * C
            before = tl.load(states_ptr + place[:, None] + channel[None, :], mask=old, other=0.0)
            value = tl.where(old, before.to(tl.float32), value)
        weight = tl.load(weight_ptr + (K - 1 - back) * C + channel, mask=channel_in, other=0.0)
        sums += value * weight.to(tl.float32)[None, :]
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + channel, mask=channel_in, other=0.0).to(tl.float32)[None, :]
    if SILU:
        sums = sums / (1.0 + tl.exp(-sums))
    at = token.to(tl.int64)[:, None] * C + channel[None, :]
    tl.store(out_ptr + at, sums.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _keep_inputs(
    x_ptr,
    states_ptr,
    reads_ptr,
    writes_ptr,
    query_starts_ptr,
    x_stride: tl.int64,
    C: tl.constexpr,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The new states, oldest input first: a thread reads what it overwrites before it does."""
    request = tl.program_id(0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    channel_in = channel < C
    start = tl.load(query_starts_ptr + request)
    end = tl.load(query_starts_ptr + request + 1)
    count = end - start
    page = tl.load(reads_ptr + request).to(tl.int64)
    target = tl.load(writes_ptr + request).to(tl.int64)
    for place in tl.static_range(K - 1):
        back = K - 1 - place  # inputs from the end
        new = channel < tl.where(count >= back, C, 0)
        value = tl.load(x_ptr + (end - back).to(tl.int64) * x_stride + channel, mask=new, other=0.0)
        old = channel < tl.where((count < back) & (page >= 0), C, 0)
        before = tl.load(states_ptr + (page * (K - 1) + place + count) * C + channel, mask=old, other=0.0)
        kept = tl.where(count < back, before, value.to(before.dtype))
        tl.store(states_ptr + (target * (K - 1) + place) * C + channel, kept, mask=channel_in)


def short_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, states: Tensor, batch: StateBatch
) -> Tensor:
    """See the package's contract."""
    assert x.stride(1) == 1
    assert states.is_contiguous()
    tokens, channels = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = min(_CHANNELS, triton.next_power_of_2(channels))
    tiles = triton.cdiv(channels, block)
    convolve: Any = _convolve
    convolve[(triton.cdiv(tokens, _TOKENS), tiles)](
        x,
        weight,
        bias,
        out,
        states,
        batch.reads,
        batch.query_starts,
        batch.requests,
        x.stride(0),
        tokens,
        C=channels,
        K=weight.shape[0],
        SILU=silu,
        TOKENS=_TOKENS,
        CHANNELS=block,
        num_warps=4,
    )
    keep: Any = _keep_inputs
    keep[(batch.reads.shape[0], tiles)](
        x,
        states,
        batch.reads,
        batch.writes,
        batch.query_starts,
        x.stride(0),
        C=channels,
        K=weight.shape[0],
        CHANNELS=block,
        num_warps=4,
    )
    return out


@triton.jit
def _step_sizes(raw, low, high):
    softplus = tl.where(raw > 20.0, raw, tl.log(1.0 + tl.exp(tl.minimum(raw, 20.0))))
    return tl.minimum(tl.maximum(softplus, low), high)


@triton.jit
def _recur(
    q_ptr,
    k_ptr,
    v_ptr,
    dt_ptr,
    beta_ptr,
    decay_ptr,
    dt_bias_ptr,
    skip_ptr,
    out_ptr,
    states_ptr,
    reads_ptr,
    writes_ptr,
    query_starts_ptr,
    q_stride: tl.int64,
    k_stride: tl.int64,
    v_stride: tl.int64,
    dt_stride: tl.int64,
    beta_stride: tl.int64,
    low,
    high,
    scale,
    eps,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Chunks of CHUNK tokens by products of matrices, what is left token by token; 0: all token by token.

    The state is fp32 throughout; products of 16-bit inputs take it, too, in 16 bits.
    """
    request = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.arange(0, ROWS)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    row_in, column_in = row < D, column < P
    inside = row_in[:, None] & column_in[None, :]
    start = tl.load(query_starts_ptr + request)
    end = tl.load(query_starts_ptr + request + 1)
    page = tl.load(reads_ptr + request).to(tl.int64)
    target = tl.load(writes_ptr + request).to(tl.int64)
    place = head * D * P + row[:, None] * P + column[None, :]
    known = inside & (row < tl.where(page >= 0, D, 0))[:, None]
    state = tl.load(states_ptr + page * (H * D * P) + place, mask=known, other=0.0)
    decay = tl.load(decay_ptr + head)
    dt_bias = tl.load(dt_bias_ptr + head)
    group = head // (H // G)
    q_ptr += group * D
    k_ptr += group * D
    v_ptr += head * P
    out_ptr += head * P
    if CHUNK > 0:
        i = tl.arange(0, CHUNK)
        whole = (end - start) // CHUNK
        for chunk in range(whole):
            at = (start + chunk * CHUNK + i).to(tl.int64)
            step = _step_sizes(tl.load(dt_ptr + at * dt_stride + head).to(tl.float32) + dt_bias, low, high)
            fading = tl.cumsum(decay * step, 0)  # logarithm of what is left of the state after each token
            last = tl.sum(decay * step, 0)
            query = tl.load(q_ptr + at[:, None] * q_stride + row[None, :], mask=row_in[None, :], other=0.0)
            key = tl.load(k_ptr + at[:, None] * k_stride + row[None, :], mask=row_in[None, :], other=0.0)
            value = tl.load(v_ptr + at[:, None] * v_stride + column[None, :], mask=column_in[None, :], other=0.0)
            query, key, value = query.to(tl.float32), key.to(tl.float32), value.to(tl.float32)
            if beta_ptr is not None:
                query *= (scale * tl.rsqrt(tl.sum(query * query, 1) + eps))[:, None]
                key *= tl.rsqrt(tl.sum(key * key, 1) + eps)[:, None]
            queries, keys = query.to(q_ptr.dtype.element_ty), key.to(q_ptr.dtype.element_ty)
            before = i[:, None] >= i[None, :]
            between = tl.exp(tl.where(before, fading[:, None] - fading[None, :], float("-inf")))
            left = tl.exp(fading)[:, None]
            if beta_ptr is None:
                added = value * step[:, None]
            else:
                # Each token corrects what those before it in the chunk have added: a triangular system, solved row
                # by row (Yang et al. 2024).
                rate = tl.sigmoid(tl.load(beta_ptr + at * beta_stride + head).to(tl.float32))[:, None]
                added = rate * (value - left * tl.dot(keys, state.to(keys.dtype), input_precision="ieee"))
                overlap = rate * tl.dot(keys, keys.T, input_precision="ieee") * between
                for solved in range(1, CHUNK):
                    weights = tl.sum(tl.where((i == solved)[:, None] & (i < solved)[None, :], overlap, 0.0), 0)
                    correction = tl.sum(weights[:, None] * added, 0)
                    added = tl.where((i == solved)[:, None], added - correction[None, :], added)
            seen = tl.dot(queries, keys.T, input_precision="ieee") * between
            read = left * tl.dot(queries, state.to(keys.dtype), input_precision="ieee")
            read += tl.dot(seen.to(keys.dtype), added.to(keys.dtype), input_precision="ieee")
            if skip_ptr is not None:
                read += tl.load(skip_ptr + head) * value
            out_at = at[:, None] * (H * P) + column[None, :]
            tl.store(out_ptr + out_at, read.to(out_ptr.dtype.element_ty), mask=column_in[None, :])
            remaining = tl.exp(last - fading)[:, None] * added
            state = tl.exp(last) * state + tl.dot(keys.T, remaining.to(keys.dtype), input_precision="ieee")
        start += whole * CHUNK
    for token in range(start, end):
        at = tl.cast(token, tl.int64)
        step = _step_sizes(tl.load(dt_ptr + at * dt_stride + head).to(tl.float32) + dt_bias, low, high)
        state *= tl.exp(decay * step)
        query = tl.load(q_ptr + at * q_stride + row, mask=row_in, other=0.0).to(tl.float32)
        key = tl.load(k_ptr + at * k_stride + row, mask=row_in, other=0.0).to(tl.float32)
        value = tl.load(v_ptr + at * v_stride + column, mask=column_in, other=0.0).to(tl.float32)
        if beta_ptr is None:
            added = value * step
        else:
            query *= scale * tl.rsqrt(tl.sum(query * query) + eps)
            key *= tl.rsqrt(tl.sum(key * key) + eps)
            rate = tl.sigmoid(tl.load(beta_ptr + at * beta_stride + head).to(tl.float32))
            added = (value - tl.sum(state * key[:, None], 0)) * rate
        state += key[:, None] * added[None, :]
        read = tl.sum(state * query[:, None], 0)
        if skip_ptr is not None:
            read += tl.load(skip_ptr + head) * value
        tl.store(out_ptr + at * (H * P) + column, read.to(out_ptr.dtype.element_ty), mask=column_in)
    tl.store(states_ptr + target * (H * D * P) + place, state, mask=inside)


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    beta: Tensor | None,
    gates: Gates,
    states: Tensor,
    batch: StateBatch,
    *,
    invariant: bool = False,
) -> Tensor:
    """See the package's contract. `invariant`: token by token, so that no bit depends on how a prompt is cut up."""
    tokens, heads, columns = v.shape
    groups, rows = k.shape[1:]
    assert all(x.stride(1) == x.shape[2] and x.stride(2) == 1 for x in (q, k, v)), "heads of a token are consecutive"
    assert states.is_contiguous()
    out = torch.empty((tokens, heads, columns), dtype=v.dtype, device=v.device)
    block = min(32, max(16, triton.next_power_of_2(columns)))  # a tile of the state is 16 KiB of registers at D = 128
    kernel: Any = _recur
    kernel[(batch.reads.shape[0], heads, triton.cdiv(columns, block))](
        q,
        k,
        v,
        dt,
        beta,
        gates.decay,
        gates.dt_bias,
        gates.skip,
        out,
        states,
        batch.reads,
        batch.writes,
        batch.query_starts,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        dt.stride(0),
        0 if beta is None else beta.stride(0),
        *gates.limits,
        rows**-0.5,
        NORM_EPS,
        H=heads,
        G=groups,
        D=rows,
        P=columns,
        ROWS=max(16, triton.next_power_of_2(rows)),
        COLUMNS=block,
        CHUNK=0 if invariant or batch.longest_query < _CHUNK else _CHUNK,
        num_warps=4,
        num_stages=1,
    )
    return out
