"""Sampling in Triton: tokens against the sorted reference, distributions against the exact ones by chi-square."""

import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from quire_kernels.native.backend import NativeBackend
from quire_kernels.sampling import Biases, Penalties, Prepared, Rows, host, reference, triton
from quire_kernels.sampling.triton import add_bias, draw, mask_logits, penalize, prepare, token_logprobs


def make_rows(size: int, **values: float) -> Rows:
    def filled(name: str, default: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((size,), values.get(name, default), dtype=dtype)

    return Rows(
        temperature=filled("temperature", 1.0, torch.float32),
        top_k=filled("top_k", 0, torch.int32),
        top_p=filled("top_p", 1.0, torch.float32),
        min_p=filled("min_p", 0.0, torch.float32),
        seeds=torch.randint(-(2**62), 2**62, (size,)),
        positions=torch.randint(0, 2**40, (size,)),
    )


PARAMETERS = [
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 50, "temperature": 1.3},
    {"top_k": 5, "top_p": 0.8},
    {"top_p": 0.3},
    {"top_p": 0.95, "temperature": 2.0},
    {"min_p": 0.05},
    {"min_p": 0.01, "top_k": 40, "top_p": 0.9},
    {"top_p": 0.999},
]


@pytest.mark.parametrize(("dtype", "masked"), [(torch.float32, False), (torch.bfloat16, True)])
@pytest.mark.parametrize("values", PARAMETERS, ids=str)
@pytest.mark.parametrize("vocabulary", [63, 4096, 9001])
def test_what_may_be_drawn(vocabulary: int, values: dict[str, float], masked: bool, dtype: torch.dtype) -> None:
    size = 4
    rows = make_rows(size, **values)
    logits = (torch.randn(size, vocabulary + 5) * 4).to(dtype)[:, :vocabulary]
    if masked:
        logits[torch.rand(size, vocabulary) < 0.5] = -math.inf
    if vocabulary > 100:
        logits[1] *= 0.0025  # nearly uniform
        logits[2, 77] = 60.0  # nearly certain
    expected = reference.probabilities(logits, rows)
    prepared = prepare(logits, rows)
    scaled = logits.float() / rows.temperature.clamp(min=1e-9)[:, None]
    if values.get("temperature", 1) > 0:
        kept = scaled >= prepared.threshold[:, None]
        kept &= scaled > -math.inf
        wrong = kept != (expected > 0)
        assert (expected * wrong).sum() < 1e-4, "no more than ties of the nucleus' last token may differ"
        assert wrong.sum() <= (size if "top_p" in values else 0)
        mass = torch.where(kept, scaled.double(), -math.inf).logsumexp(-1)
        torch.testing.assert_close(prepared.log_mass.double(), mass, atol=2e-4, rtol=0)
    tokens = draw(logits, rows, prepared)
    assert (expected.gather(1, tokens.long()[:, None]) > 0).all()
    same = tokens == reference.draw(logits, rows)
    assert same.sum() >= size - 1, "inversion in fp32 may be one token off at an edge"
    unfiltered = values.keys() <= {"temperature"}
    if unfiltered:
        again = prepare(logits, rows, filtered=False)
        assert torch.equal(draw(logits, rows, again), tokens)


def test_nothing_possible_is_said() -> None:
    logits = torch.randn(3, 5000)
    mask_logits(logits, torch.tensor([1]), torch.zeros(1, 157, dtype=torch.int32))
    rows = make_rows(3, top_p=0.9)
    tokens = draw(logits, rows, prepare(logits, rows))
    assert tokens[1] == -1
    assert (tokens[[0, 2]] >= 0).all()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 5, "min_p": 0.01}], ids=["all", "top_p", "top_k"])
def test_a_broken_row_draws_nothing(temperature: float, filters: dict[str, float]) -> None:
    """A logit that is no number, or infinite, wherever it stands: as on a CPU, and never a token past the last."""
    logits = torch.randn(5, 5000)
    logits[1, 4999] = logits[2, 17] = math.nan
    logits[3] = math.nan
    logits[4, 4096] = math.inf
    rows = make_rows(5, **filters)
    rows.temperature.fill_(temperature)
    tokens = draw(logits, rows, prepare(logits, rows, filtered=bool(filters)))
    assert tokens[1:].tolist() == [-1] * 4
    assert tokens.tolist() == host.draw(logits, rows).tolist()


def repeated(prepared: Prepared, times: int) -> Prepared:
    """The same rows again and again, prepared once: the interpreter is slow."""
    return Prepared(*(torch.cat([getattr(prepared, field.name)] * times) for field in fields(prepared)))


def chi_square(counts: np.ndarray, expected: np.ndarray) -> None:
    """The counts are draws from the expected distribution, at odds of one in a million."""
    assert counts[expected == 0].sum() == 0
    kept = expected * counts.sum() >= 5
    rest = ~kept & (expected > 0)
    observed = np.append(counts[kept], counts[rest].sum())
    wanted = np.append(expected[kept], expected[rest].sum()) * counts.sum()
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    freedom = len(wanted) - 1
    # Wilson and Hilferty: the cube root of chi-square over its freedom is nearly normal.
    deviations = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
    assert deviations < 4.9, (statistic, freedom)


@pytest.mark.parametrize("values", [{"temperature": 1.0}, {"top_k": 9, "temperature": 1.5}, {"top_p": 0.85}], ids=str)
def test_draws_follow_the_distribution(values: dict[str, float]) -> None:
    size = 500
    one = torch.randn(1, 40) * 1.5
    rows = make_rows(size, **values)
    prepared = prepare(one, make_rows(1, **values))
    logits = one.repeat(size, 1)
    tokens = draw(logits, rows, repeated(prepared, size)).numpy()
    chi_square(np.bincount(tokens, minlength=40), reference.probabilities(logits[:1], rows)[0].numpy())


def test_penalties_and_biases() -> None:
    logits = torch.randn(3, 1000) * 3
    starts = torch.tensor([0, 400, 400, 410], dtype=torch.int32)
    tokens = torch.cat((torch.randperm(1000)[:400], torch.randperm(1000)[:10])).int()
    parameters = {name: torch.rand(3) + 0.5 for name in ("repetition", "frequency", "presence")}
    penalties = Penalties(starts=starts, tokens=tokens, counts=torch.randint(0, 4, (410,)).int(), **parameters)
    values = torch.randn(410) * 5
    values[7] = -math.inf
    biases = Biases(starts=starts, tokens=tokens, values=values)
    got, expected = logits.clone(), logits.clone()
    penalize(got, penalties)
    reference.penalize(expected, penalties)
    add_bias(got, biases)
    reference.add_bias(expected, biases)
    torch.testing.assert_close(got, expected)
    assert torch.equal(got[1], logits[1])
    assert got[0, tokens[7]] == -math.inf


@pytest.mark.parametrize("kernel", ["reference", "triton", "native"])
@pytest.mark.parametrize("places", [[], [2], [4, 0, 3], [3, 1, 4, 2, 0]], ids=str)
@pytest.mark.parametrize("vocabulary", [32, 63, 1000, 49153, 151936])
def test_a_mask_changes_nothing_but_what_it_forbids(vocabulary: int, places: list[int], kernel: str) -> None:
    """Bit for bit, numbers that are none included; what lies between the rows is not written either."""
    masking = {"reference": reference, "triton": triton, "native": NativeBackend()}[kernel].mask_logits
    kept = torch.randn(5, vocabulary + 7)
    kept[:, 3] = math.nan
    kept[:, vocabulary - 1] = math.inf
    kept[1] = math.nan
    words = torch.randint(-(2**31), 2**31, (len(places), -(-vocabulary // 32) + 2)).int()
    words[1:2], words[2:3] = 0, -1  # nothing and all
    masks = words[:, 1:-1]
    allowed = np.ones((5, vocabulary), np.bool_)
    bits = np.unpackbits(np.ascontiguousarray(masks.numpy()).view(np.uint8), axis=1, bitorder="little")
    allowed[places] = bits[:, :vocabulary]
    expected = kept.numpy().copy()
    expected[:, :vocabulary][~allowed] = -np.inf
    for dtype in (torch.int32, torch.int64):
        got = kept.clone()
        masking(got[:, :vocabulary], torch.tensor(places, dtype=dtype), masks)
        np.testing.assert_array_equal(got.numpy().view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [63, 32003])
def test_token_logprobs(vocabulary: int, dtype: torch.dtype) -> None:
    logits = (torch.randn(5, vocabulary) * 4).to(dtype)
    logits[0, :60] = -math.inf
    tokens = torch.randint(60, vocabulary, (5,)).int()
    for got, expected in zip(token_logprobs(logits, tokens), reference.token_logprobs(logits, tokens), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)


def test_a_row_draws_the_same_in_any_batch() -> None:
    logits, rows = torch.randn(6, 9000), make_rows(6, top_p=0.9)
    whole = draw(logits, rows, prepare(logits, rows))
    for row in range(6):
        alone = Rows(**{
            name: getattr(rows, name)[row : row + 1]
            for name in ("temperature", "top_k", "top_p", "min_p", "seeds", "positions")
        })  # fmt: skip
        assert draw(logits[row : row + 1], alone, prepare(logits[row : row + 1], alone)) == whole[row]
