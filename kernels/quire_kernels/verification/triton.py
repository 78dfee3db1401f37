"""Verification of drafts in Triton: no host looks on."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels.hardware import hardware
from quire_kernels.sampling import ACCEPT, CHUNK, RESIDUAL, Prepared, Rows
from quire_kernels.sampling.triton import pick, probability, uniform


@triton.jit
def _draft_probability(
    logits_ptr, temperature_ptr, best_ptr, threshold_ptr, log_mass_ptr, row, ids, token, V, stride
):  # fmt: skip
    """What the draft token was drawn with; where it was not drawn, all lies on it."""
    if logits_ptr is not None:
        return probability(logits_ptr, temperature_ptr, best_ptr, threshold_ptr, log_mass_ptr, row, ids, V, stride)
    return (ids == token).to(tl.float32)


@triton.jit
def _accept(
    target_ptr, temperature_ptr, best_ptr, threshold_ptr, log_mass_ptr, seeds_ptr, positions_ptr,
    draft_ptr, draft_temperature_ptr, draft_best_ptr, draft_threshold_ptr, draft_log_mass_ptr,
    draft_tokens_ptr, accepted_ptr, tokens_ptr, V, stride: tl.int64, draft_stride: tl.int64,
    K: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0).to(tl.int64)
    accepted = 0
    going = 1
    for i in range(K):
        token = tl.load(draft_tokens_ptr + request * K + i)
        going = tl.where(token >= 0, going, 0)
        taken = -1
        if going == 1:
            row = request * (K + 1) + i
            p = probability(target_ptr, temperature_ptr, best_ptr, threshold_ptr, log_mass_ptr, row, token, V, stride)
            q = _draft_probability(
                draft_ptr, draft_temperature_ptr, draft_best_ptr, draft_threshold_ptr, draft_log_mass_ptr,
                request * K + i, token, token, V, draft_stride,
            )  # fmt: skip
            number = uniform(seeds_ptr, positions_ptr, row, 0, STREAM)
            if number * q.to(tl.float64) < p.to(tl.float64):
                accepted += 1
                taken = token
            else:
                going = 0
        tl.store(tokens_ptr + request * (K + 1) + i, taken)
    tl.store(tokens_ptr + request * (K + 1) + K, -1)
    tl.store(accepted_ptr + request, accepted)


@triton.jit
def _residual(
    target_ptr, temperature_ptr, best_ptr, threshold_ptr, log_mass_ptr,
    draft_ptr, draft_temperature_ptr, draft_best_ptr, draft_threshold_ptr, draft_log_mass_ptr,
    draft_tokens_ptr, request, accepted, ids, V, stride, draft_stride, K: tl.constexpr,
):  # fmt: skip
    """What is left for the token after the accepted ones: p, less q where a draft was rejected."""
    p = probability(
        target_ptr, temperature_ptr, best_ptr, threshold_ptr, log_mass_ptr,
        request * (K + 1) + accepted, ids, V, stride,
    )  # fmt: skip
    token = tl.load(draft_tokens_ptr + request * K + accepted, mask=accepted < K, other=-1)
    if token >= 0:
        q = _draft_probability(
            draft_ptr, draft_temperature_ptr, draft_best_ptr, draft_threshold_ptr, draft_log_mass_ptr,
            request * K + accepted, ids, token, V, draft_stride,
        )  # fmt: skip
        p = tl.maximum(p - q, 0.0)
    return p


@triton.jit
def _residual_mass(
    target_ptr, temperature_ptr, best_ptr, threshold_ptr, log_mass_ptr, max_ptr,
    draft_ptr, draft_temperature_ptr, draft_best_ptr, draft_threshold_ptr, draft_log_mass_ptr,
    draft_tokens_ptr, accepted_ptr, mass_ptr, V, stride: tl.int64, draft_stride: tl.int64,
    K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    request, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    chunks = tl.num_programs(1)
    accepted = tl.load(accepted_ptr + request)
    row = request * (K + 1) + accepted
    mass = 0.0
    if tl.load(max_ptr + row * chunks + chunk) >= tl.load(threshold_ptr + row):
        left = _residual(
            target_ptr, temperature_ptr, best_ptr, threshold_ptr, log_mass_ptr,
            draft_ptr, draft_temperature_ptr, draft_best_ptr, draft_threshold_ptr, draft_log_mass_ptr,
            draft_tokens_ptr, request, accepted, chunk * CHUNK + tl.arange(0, CHUNK), V, stride, draft_stride, K,
        )  # fmt: skip
        mass = tl.sum(left, 0)
    tl.store(mass_ptr + request * chunks + chunk, mass)


@triton.jit
def _draw_residual(
    target_ptr, temperature_ptr, best_ptr, threshold_ptr, log_mass_ptr, seeds_ptr, positions_ptr,
    draft_ptr, draft_temperature_ptr, draft_best_ptr, draft_threshold_ptr, draft_log_mass_ptr,
    draft_tokens_ptr, accepted_ptr, mass_ptr, tokens_ptr, V, chunks,
    stride: tl.int64, draft_stride: tl.int64,
    K: tl.constexpr, STREAM: tl.constexpr, CHUNK: tl.constexpr, C_PADDED: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0).to(tl.int64)
    accepted = tl.load(accepted_ptr + request)
    row = request * (K + 1) + accepted
    chunk = tl.arange(0, C_PADDED)
    mass = tl.load(mass_ptr + request * chunks + chunk, mask=chunk < chunks, other=0.0)
    total = tl.sum(mass, 0)
    token = tl.load(best_ptr + row)
    if (token >= 0) & (total > 0.0):  # no mass: p equals q up to rounding, and the most likely token stands in
        target = (uniform(seeds_ptr, positions_ptr, row, 0, STREAM) * total).to(tl.float32)
        chosen, before = pick(mass, target)
        left = _residual(
            target_ptr, temperature_ptr, best_ptr, threshold_ptr, log_mass_ptr,
            draft_ptr, draft_temperature_ptr, draft_best_ptr, draft_threshold_ptr, draft_log_mass_ptr,
            draft_tokens_ptr, request, accepted, chosen * CHUNK + tl.arange(0, CHUNK), V, stride, draft_stride, K,
        )  # fmt: skip
        place, _ = pick(left, target - before)
        token = chosen * CHUNK + place
    tl.store(tokens_ptr + request * (K + 1) + accepted, token)


def verify(
    target: Tensor,
    rows: Rows,
    prepared: Prepared,
    draft_tokens: Tensor,
    draft: Tensor | None = None,
    draft_rows: Rows | None = None,
    draft_prepared: Prepared | None = None,
) -> Tensor:
    """See the package's contract."""
    hardware(target.device)
    requests, k = draft_tokens.shape
    vocabulary, chunks = target.shape[1], prepared.chunk_max.shape[1]
    assert target.shape[0] == requests * (k + 1), "one row more than drafts for each request"
    tokens = torch.empty((requests, k + 1), dtype=torch.int32, device=target.device)
    accepted = torch.empty((requests,), dtype=torch.int32, device=target.device)
    masses = torch.empty((requests, chunks), dtype=torch.float32, device=target.device)
    of_target = (target, rows.temperature, prepared.best, prepared.threshold, prepared.log_mass)
    of_draft: tuple[Tensor | None, ...] = (None,) * 5
    if draft is not None:
        assert draft_rows is not None
        assert draft_prepared is not None
        of_draft = (
            draft,
            draft_rows.temperature,
            draft_prepared.best,
            draft_prepared.threshold,
            draft_prepared.log_mass,
        )
    numbers = (rows.seeds, rows.positions)
    strides = (target.stride(0), 0 if draft is None else draft.stride(0))
    kernel: Any = _accept
    kernel[(requests,)](
        *of_target, *numbers, *of_draft, draft_tokens, accepted, tokens, vocabulary, *strides, K=k, STREAM=ACCEPT,
        num_warps=1,
    )  # fmt: skip
    kernel = _residual_mass
    kernel[(requests, chunks)](
        *of_target, prepared.chunk_max, *of_draft, draft_tokens, accepted, masses, vocabulary, *strides, K=k,
        CHUNK=CHUNK, num_warps=8,
    )  # fmt: skip
    kernel = _draw_residual
    kernel[(requests,)](
        *of_target, *numbers, *of_draft, draft_tokens, accepted, masses, tokens, vocabulary, chunks, *strides, K=k,
        STREAM=RESIDUAL, CHUNK=CHUNK, C_PADDED=triton.next_power_of_2(chunks), num_warps=8,
    )  # fmt: skip
    return tokens
