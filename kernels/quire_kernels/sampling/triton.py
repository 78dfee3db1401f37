"""Sampling in Triton, over vocabularies of any size in chunks, without sorting.

Where a row is filtered, thresholds are found by bisection over the bit patterns of floats, exactly, among candidates
alone: a token lighter than (1 - p) / V of the whole is in no nucleus, and the k-th largest of the chunks' maxima is a
lower bound of the k-th largest token. A draw is one number by inversion: chunk first, then token.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels.hardware import hardware
from quire_kernels.sampling import CHUNK, Biases, Penalties, Prepared, Rows

_SEARCH = 2048  # candidates that the bisection reads at a time


@triton.jit
def _edit(
    logits_ptr, starts_ptr, tokens_ptr, counts_ptr, values_ptr, repetition_ptr, frequency_ptr, presence_ptr,
    stride: tl.int64, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    begin, end = tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < end
        token = tl.load(tokens_ptr + at, mask=inside, other=0)
        x = tl.load(logits_ptr + row * stride + token, mask=inside, other=0.0)
        if values_ptr is not None:
            x += tl.load(values_ptr + at, mask=inside, other=0.0)
        else:
            repetition = tl.load(repetition_ptr + row)
            count = tl.load(counts_ptr + at, mask=inside, other=0).to(tl.float32)
            x = tl.where(x > 0, x / repetition, x * repetition)
            x -= tl.load(frequency_ptr + row) * count + tl.load(presence_ptr + row) * tl.minimum(count, 1.0)
        tl.store(logits_ptr + row * stride + token, x, mask=inside)


def penalize(logits: Tensor, penalties: Penalties) -> None:
    """See the package's contract."""
    p = penalties
    _launch_edit(logits, p.starts, p.tokens, p.counts, None, p.repetition, p.frequency, p.presence)


def add_bias(logits: Tensor, biases: Biases) -> None:
    """See the package's contract."""
    _launch_edit(logits, biases.starts, biases.tokens, None, biases.values, None, None, None)


def _launch_edit(logits: Tensor, *lists: Tensor | None) -> None:
    assert logits.dtype == torch.float32, "edits of narrower logits would be lost in rounding"
    hardware(logits.device)
    kernel: Any = _edit
    kernel[(logits.shape[0],)](logits, *lists, logits.stride(0), BLOCK=256, num_warps=4)


# Of a stride that is not known to be aligned: then a warp's lanes write tokens side by side, not four of them each.
@triton.jit(do_not_specialize=["stride", "words"])
def _mask_logits(logits_ptr, places_ptr, masks_ptr, V, stride: tl.int64, words: tl.int64, CHUNK: tl.constexpr):
    listed = tl.program_id(0).to(tl.int64)
    row = tl.load(places_ptr + listed).to(tl.int64)
    ids = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    bits = tl.load(masks_ptr + listed * words + ids // 32, mask=ids < V, other=-1)
    tl.store(logits_ptr + row * stride + ids, float("-inf"), mask=(bits >> (ids % 32)) & 1 == 0)


def mask_logits(logits: Tensor, places: Tensor, masks: Tensor) -> None:
    """See the package's contract."""
    vocabulary = logits.shape[1]
    assert logits.dtype == torch.float32
    assert masks.shape == (len(places), triton.cdiv(vocabulary, 32)), "a bit for each token"
    assert logits.stride(1) == masks.stride(1) == 1, "tokens of a row follow on"
    hardware(logits.device)
    kernel: Any = _mask_logits
    kernel[(len(places), triton.cdiv(vocabulary, CHUNK))](
        logits, places, masks, vocabulary, logits.stride(0), masks.stride(0), CHUNK=CHUNK, num_warps=8
    )


@triton.jit
def _scaled(logits_ptr, temperature_ptr, row, ids, V, stride):
    """logit / temperature of a row's tokens, minus infinity past the vocabulary."""
    temperature = tl.load(temperature_ptr + row)
    x = tl.load(logits_ptr + row * stride + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
    return tl.where(temperature > 0, x / tl.where(temperature > 0, temperature, 1.0), x)


@triton.jit
def _chunk_stats(
    logits_ptr, temperature_ptr, max_ptr, sum_ptr, arg_ptr, V, stride: tl.int64, CHUNK: tl.constexpr
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = _scaled(logits_ptr, temperature_ptr, row, ids, V, stride)
    broken = (x != x) | (x == float("inf"))
    x = tl.where(broken, float("-inf"), x)
    best = tl.max(x, 0)
    total = tl.sum(tl.exp(x - tl.where(best == float("-inf"), 0.0, best)), 0)
    at = row * tl.num_programs(1) + chunk
    tl.store(max_ptr + at, tl.where(tl.max(broken.to(tl.int32), 0) > 0, float("inf"), best))
    tl.store(sum_ptr + at, total)
    tl.store(arg_ptr + at, chunk * CHUNK + tl.argmax(x, 0))


@triton.jit
def _key(x):
    """fp32 → int32 in the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _value(key):
    """The inverse of `_key`."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _count_and_mass(candidates_ptr, count, threshold, best, SEARCH: tl.constexpr):
    """How many candidates are at least the threshold, and the sum of e^(x - best) of these."""
    found = 0
    mass = 0.0
    for start in range(0, count, SEARCH):
        at = start + tl.arange(0, SEARCH)
        x = tl.load(candidates_ptr + at, mask=at < count, other=float("-inf"))
        kept = (x >= threshold) & (at < count)
        found += tl.sum(kept.to(tl.int32), 0)
        mass += tl.sum(tl.where(kept, tl.exp(x - best), 0.0), 0)
    return found, mass


@triton.jit
def _candidates(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    max_ptr,
    sum_ptr,
    arg_ptr,
    candidates_ptr,
    count_ptr,
    best_ptr,
    threshold_ptr,
    log_mass_ptr,
    V,
    chunks,
    stride: tl.int64,
    CHUNK: tl.constexpr,
    C_PADDED: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """The row's best token and whole mass; a first threshold, below which nothing takes part, and what reaches it."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, C_PADDED)
    at = row * chunks + chunk
    maxima = tl.load(max_ptr + at, mask=chunk < chunks, other=float("-inf"))
    best = tl.max(maxima, 0)
    possible = (best > float("-inf")) & (best < float("inf"))  # infinity: some logit is none
    token = tl.load(arg_ptr + row * chunks + tl.argmax(maxima, 0))
    tl.store(best_ptr + row, tl.where(possible, token, -1))
    best = tl.where(possible, best, 0.0)
    sums = tl.load(sum_ptr + at, mask=chunk < chunks, other=0.0)
    shares = tl.exp(tl.where(possible, maxima - best, 0.0))
    tl.store(log_mass_ptr + row, best + tl.log(tl.sum(sums * shares, 0)))

    top_k, top_p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    top_k = tl.where((top_k <= 0) | (top_k >= V), 0, top_k)
    low = float("-inf")
    count = 0
    filtered = (top_k > 0) | (top_p < 1.0) | (min_p > 0.0)
    if filtered & possible & (tl.load(temperature_ptr + row) > 0):
        if min_p > 0.0:
            low = best + tl.log(min_p)
        if top_k > 0:
            if top_k <= chunks:  # the k-th largest maximum
                begin, end = -2147483648, _key(best) + 1
                while end - 1 > begin:
                    middle = (begin >> 1) + (end >> 1) + (begin & end & 1)
                    if tl.sum(((maxima >= _value(middle)) & (chunk < chunks)).to(tl.int32), 0) >= top_k:
                        begin = middle
                    else:
                        end = middle
                low = tl.maximum(low, _value(begin))
        elif (top_p < 1.0) & (min_p == 0.0):
            low = best + tl.log((1.0 - top_p) * 0.5 / V)  # half: for the rounding of sums
        candidates_ptr += row * V
        for i in range(chunks):
            if tl.load(max_ptr + row * chunks + i) >= low:
                for part in range(CHUNK // SEARCH):
                    ids = i * CHUNK + part * SEARCH + tl.arange(0, SEARCH)
                    x = _scaled(logits_ptr, temperature_ptr, row, ids, V, stride)
                    kept = (x >= low) & (x > float("-inf"))
                    places = count + tl.cumsum(kept.to(tl.int32), 0) - 1
                    tl.store(candidates_ptr + places, x, mask=kept)
                    count += tl.sum(kept.to(tl.int32), 0)
    tl.store(threshold_ptr + row, low)
    tl.store(count_ptr + row, count)


@triton.jit
def _thresholds(
    top_k_ptr, top_p_ptr, min_p_ptr, max_ptr, candidates_ptr, count_ptr, threshold_ptr, log_mass_ptr, V, chunks,
    C_PADDED: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """The threshold and the mass of a row that has candidates."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(count_ptr + row)
    if count == 0:
        return
    chunk = tl.arange(0, C_PADDED)
    best = tl.max(tl.load(max_ptr + row * chunks + chunk, mask=chunk < chunks, other=float("-inf")), 0)
    top_k, top_p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    top_k = tl.where((top_k <= 0) | (top_k >= V), 0, top_k)
    threshold = tl.load(threshold_ptr + row)
    candidates_ptr += row * V
    if top_k > 0:  # the largest value that at least k reach
        begin, end = _key(tl.maximum(threshold, -3.4e38)), _key(best) + 1
        while end - 1 > begin:
            middle = (begin >> 1) + (end >> 1) + (begin & end & 1)
            found, _ = _count_and_mass(candidates_ptr, count, _value(middle), best, SEARCH)
            if found >= top_k:
                begin = middle
            else:
                end = middle
        threshold = tl.maximum(threshold, _value(begin))
    if top_p < 1.0:  # the largest value that carries at least p of the mass
        _, mass = _count_and_mass(candidates_ptr, count, threshold, best, SEARCH)
        if (top_k == 0) & (min_p == 0.0):  # of all, not of the candidates alone
            mass = tl.exp(tl.load(log_mass_ptr + row) - best)
        wanted = mass * top_p
        begin, end = _key(tl.maximum(threshold, -3.4e38)), _key(best) + 1
        while end - 1 > begin:
            middle = (begin >> 1) + (end >> 1) + (begin & end & 1)
            _, carried = _count_and_mass(candidates_ptr, count, _value(middle), best, SEARCH)
            if carried >= wanted:
                begin = middle
            else:
                end = middle
        threshold = tl.maximum(threshold, _value(begin))
    _, mass = _count_and_mass(candidates_ptr, count, threshold, best, SEARCH)
    tl.store(threshold_ptr + row, threshold)
    tl.store(log_mass_ptr + row, best + tl.log(mass))


def prepare(logits: Tensor, rows: Rows, filtered: bool = True) -> Prepared:
    """See the package's contract. Not `filtered`: no row has top-k, top-p or min-p."""
    hardware(logits.device)
    size, vocabulary = logits.shape
    chunks = triton.cdiv(vocabulary, CHUNK)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    maxima, sums, args = empty(size, chunks), empty(size, chunks), empty(size, chunks, dtype=torch.int32)
    kernel: Any = _chunk_stats
    kernel[(size, chunks)](
        logits, rows.temperature, maxima, sums, args, vocabulary, logits.stride(0), CHUNK=CHUNK, num_warps=8
    )
    best, threshold, log_mass = empty(size, dtype=torch.int32), empty(size), empty(size)
    count = empty(size, dtype=torch.int32)
    candidates = empty(size, vocabulary) if filtered else threshold
    padded = triton.next_power_of_2(chunks)
    kernel = _candidates
    kernel[(size,)](
        logits,
        rows.temperature,
        rows.top_k,
        rows.top_p,
        rows.min_p,
        maxima,
        sums,
        args,
        candidates,
        count,
        best,
        threshold,
        log_mass,
        vocabulary,
        chunks,
        logits.stride(0),
        CHUNK=CHUNK,
        C_PADDED=padded,
        SEARCH=_SEARCH,
        num_warps=8,
    )
    if filtered:
        kernel = _thresholds
        kernel[(size,)](
            rows.top_k, rows.top_p, rows.min_p, maxima, candidates, count, threshold, log_mass, vocabulary, chunks,
            C_PADDED=padded, SEARCH=_SEARCH, num_warps=8,
        )  # fmt: skip
    return Prepared(maxima, best, threshold, log_mass)


@triton.jit
def _uniform(seeds_ptr, positions_ptr, row):
    """The generator's number for (seed, position) in [0, 1), fp64: `random.philox_uniform`."""
    position = tl.load(positions_ptr + row).to(tl.int64)
    seed = tl.load(seeds_ptr + row).to(tl.uint64)
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = (position >> 32).to(tl.uint32)
    zero = tl.full([], 0, tl.uint32)
    a, b, _, _ = tl.philox(seed, low, high, zero, zero)
    bits = ((a.to(tl.uint64) << 32) | b.to(tl.uint64)) >> 11
    return bits.to(tl.float64) * 1.1102230246251565e-16  # 2^-53


@triton.jit
def _probability(logits_ptr, temperature_ptr, threshold_ptr, log_mass_ptr, row, ids, V, stride):
    """Of a prepared row's tokens, where its temperature is not 0."""
    x = _scaled(logits_ptr, temperature_ptr, row, ids, V, stride)
    return tl.where(x >= tl.load(threshold_ptr + row), tl.exp(x - tl.load(log_mass_ptr + row)), 0.0)


@triton.jit
def _pick(mass, target):
    """The first place of mass [N] whose cumulative sum is over the target; the last one with any where rounding
    leaves none. Returns it and the sum before it."""
    places = tl.arange(0, mass.shape[0])
    cumulative = tl.cumsum(mass, 0)
    last = tl.max(tl.where(mass > 0, places, 0), 0)
    place = tl.minimum(tl.min(tl.where((cumulative > target) & (mass > 0), places, mass.shape[0]), 0), last)
    return place, tl.sum(tl.where(places < place, mass, 0.0), 0)


@triton.jit
def _chunk_mass(
    logits_ptr, temperature_ptr, threshold_ptr, log_mass_ptr, max_ptr, mass_ptr, V, stride: tl.int64,
    CHUNK: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = row * tl.num_programs(1) + chunk
    mass = 0.0
    if tl.load(max_ptr + at) >= tl.load(threshold_ptr + row):
        ids = chunk * CHUNK + tl.arange(0, CHUNK)
        p = _probability(logits_ptr, temperature_ptr, threshold_ptr, log_mass_ptr, row, ids, V, stride)
        mass = tl.sum(p, 0)
    tl.store(mass_ptr + at, mass)


@triton.jit
def _draw(
    logits_ptr,
    temperature_ptr,
    threshold_ptr,
    log_mass_ptr,
    best_ptr,
    seeds_ptr,
    positions_ptr,
    mass_ptr,
    tokens_ptr,
    V,
    chunks,
    stride: tl.int64,
    CHUNK: tl.constexpr,
    C_PADDED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(best_ptr + row)
    if (token >= 0) & (tl.load(temperature_ptr + row) > 0):
        chunk = tl.arange(0, C_PADDED)
        mass = tl.load(mass_ptr + row * chunks + chunk, mask=chunk < chunks, other=0.0)
        target = (_uniform(seeds_ptr, positions_ptr, row) * tl.sum(mass, 0)).to(tl.float32)
        chosen, before = _pick(mass, target)
        p = _probability(
            logits_ptr, temperature_ptr, threshold_ptr, log_mass_ptr, row,
            chosen * CHUNK + tl.arange(0, CHUNK), V, stride,
        )  # fmt: skip
        place, _ = _pick(p, target - before)
        token = chosen * CHUNK + place
    tl.store(tokens_ptr + row, token)


def draw(logits: Tensor, rows: Rows, prepared: Prepared) -> Tensor:
    """See the package's contract."""
    size, vocabulary = logits.shape
    chunks = prepared.chunk_max.shape[1]
    masses = torch.empty_like(prepared.chunk_max)
    tokens = torch.empty((size,), dtype=torch.int32, device=logits.device)
    row = (logits, rows.temperature, prepared.threshold, prepared.log_mass)
    kernel: Any = _chunk_mass
    kernel[(size, chunks)](*row, prepared.chunk_max, masses, vocabulary, logits.stride(0), CHUNK=CHUNK, num_warps=8)
    kernel = _draw
    kernel[(size,)](
        *row,
        prepared.best,
        rows.seeds,
        rows.positions,
        masses,
        tokens,
        vocabulary,
        chunks,
        logits.stride(0),
        CHUNK=CHUNK,
        C_PADDED=triton.next_power_of_2(chunks),
        num_warps=8,
    )
    return tokens


@triton.jit
def _logprob_chunks(
    logits_ptr, tokens_ptr, max_ptr, sum_ptr, above_ptr, V, stride: tl.int64, CHUNK: tl.constexpr
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits_ptr + row * stride + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
    chosen = tl.load(logits_ptr + row * stride + tl.load(tokens_ptr + row)).to(tl.float32)
    best = tl.max(x, 0)
    at = row * tl.num_programs(1) + chunk
    tl.store(max_ptr + at, best)
    tl.store(sum_ptr + at, tl.sum(tl.exp(x - tl.where(best == float("-inf"), 0.0, best)), 0))
    tl.store(above_ptr + at, tl.sum((x > chosen).to(tl.int32), 0))


@triton.jit
def _logprob_rows(
    logits_ptr, tokens_ptr, max_ptr, sum_ptr, above_ptr, logprobs_ptr, ranks_ptr, chunks, stride: tl.int64,
    C_PADDED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, C_PADDED)
    at = row * chunks + chunk
    maxima = tl.load(max_ptr + at, mask=chunk < chunks, other=float("-inf"))
    best = tl.max(maxima, 0)
    total = tl.sum(tl.load(sum_ptr + at, mask=chunk < chunks, other=0.0) * tl.exp(maxima - best), 0)
    chosen = tl.load(logits_ptr + row * stride + tl.load(tokens_ptr + row)).to(tl.float32)
    tl.store(logprobs_ptr + row, chosen - best - tl.log(total))
    tl.store(ranks_ptr + row, tl.sum(tl.load(above_ptr + at, mask=chunk < chunks, other=0), 0) + 1)


def token_logprobs(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """See the package's contract. tokens [S] int32."""
    hardware(logits.device)
    size, vocabulary = logits.shape
    chunks = triton.cdiv(vocabulary, CHUNK)
    maxima = torch.empty((size, chunks), dtype=torch.float32, device=logits.device)
    sums = torch.empty_like(maxima)
    above = torch.empty((size, chunks), dtype=torch.int32, device=logits.device)
    logprobs = torch.empty((size,), dtype=torch.float32, device=logits.device)
    ranks = torch.empty((size,), dtype=torch.int32, device=logits.device)
    kernel: Any = _logprob_chunks
    kernel[(size, chunks)](logits, tokens, maxima, sums, above, vocabulary, logits.stride(0), CHUNK=CHUNK, num_warps=8)
    kernel = _logprob_rows
    kernel[(size,)](
        logits, tokens, maxima, sums, above, logprobs, ranks, chunks, logits.stride(0),
        C_PADDED=triton.next_power_of_2(chunks), num_warps=1,
    )  # fmt: skip
    return logprobs, ranks
