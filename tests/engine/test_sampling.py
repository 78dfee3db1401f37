"""The sampler against exact distributions and written-out rules."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from quire_engine.request import EngineSampling, TokenSet
from quire_engine.sampling.edits import LogitEdits
from quire_engine.sampling.sampler import Drawn, Sampler, token_scores
from quire_engine.step import NewRow, Places
from quire_kernels.sampling import Rows
from quire_kernels.sampling.host import nucleus_edge
from quire_kernels.sampling.random import philox_uniform
from quire_kernels.torch_backend import TorchBackend
from torch.utils._python_dispatch import TorchDispatchMode

V = 50


def sampler_for(*params: EngineSampling, tokens: list[int] | None = None, num_prompt: int = 0) -> Sampler:
    sampler = Sampler(len(params), V, torch.device("cpu"), TorchBackend())
    log = tokens if tokens is not None else [1, 2, 3]
    sampler.set_rows(
        [NewRow(row, one, num_prompt or len(log), np.array(log, np.int32)) for row, one in enumerate(params)]
    )
    return sampler


def test_long_words_of_others_cost_nothing() -> None:
    edits = LogitEdits(2, V, torch.device("cpu"))
    edits.set_rows([NewRow(0, EngineSampling(bad_words=((1, 2), (1, 2, 3))), 1, np.ones(1, np.int32))])
    place = Places.alone(np.zeros(1, np.int32), np.ones(1, np.int32))

    def sizes() -> dict[str, int]:
        return {name: array.nbytes for name, array in edits.arrays(place, {0: range(1)}).items()}

    alone = sizes()
    edits.set_rows([NewRow(1, EngineSampling(bad_words=(tuple([4] * 250),)), 1, np.ones(1, np.int32))])
    assert sizes() == alone


def draw(sampler: Sampler, logits: torch.Tensor, positions: list[int] | None = None) -> list[int]:
    rows = np.arange(len(logits), dtype=np.int32)
    where = np.array(positions if positions is not None else [0] * len(logits), np.int32)
    return drawn_at(sampler, logits, Places.alone(rows, where)).tokens.tolist()


def drawn_at(sampler: Sampler, logits: torch.Tensor, places: Places) -> Drawn:
    names = ("seeds", "temperature", "top_k", "top_p", "min_p")
    tables = {name: torch.from_numpy(values) for name, values in zip(names, sampler.tables(places.rows), strict=True)}
    parameters = Rows(**tables, positions=torch.from_numpy(places.positions.astype(np.int64)))
    return sampler.draw(logits.clone(), places, parameters)


def frequencies(params: EngineSampling, logits: torch.Tensor, count: int = 20_000) -> np.ndarray:
    sampler = sampler_for(*[params] * 500)
    found = np.zeros(V)
    for at in range(count // 500):
        found += np.bincount(draw(sampler, logits.expand(500, V), list(range(at * 500, at * 500 + 500))), minlength=V)
    return found


def chi_square(found: np.ndarray, exact: np.ndarray) -> None:
    """Within five standard deviations of what chance gives; nothing where the probability is 0."""
    assert found[exact == 0].sum() == 0
    expected = exact[exact > 0] * found.sum()
    statistic = ((found[exact > 0] - expected) ** 2 / expected).sum()
    freedom = (exact > 0).sum() - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom) + 1


def exact(logits: torch.Tensor, temperature: float = 1.0, keep: torch.Tensor | None = None) -> np.ndarray:
    probabilities = torch.softmax(logits.double() / temperature, -1)
    if keep is not None:
        probabilities = probabilities * keep
    return (probabilities / probabilities.sum()).numpy()


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(3)) * 2


def test_philox_is_the_published_one() -> None:
    """Random123's known answer for key 0, counter 0: 6627e8d5 e169c58d."""
    [value] = philox_uniform(np.zeros(1, np.uint64), np.zeros(1, np.int64))
    assert value == ((0x6627E8D5 << 32 | 0xE169C58D) >> 11) * 2.0**-53


def test_draws_follow_the_distribution(logits: torch.Tensor) -> None:
    chi_square(frequencies(EngineSampling(seed=11), logits), exact(logits))
    chi_square(frequencies(EngineSampling(seed=12, temperature=0.5), logits), exact(logits, 0.5))


def test_top_k(logits: torch.Tensor) -> None:
    keep = torch.zeros(V)
    keep[logits.topk(7).indices] = 1
    chi_square(frequencies(EngineSampling(seed=1, top_k=7), logits), exact(logits, keep=keep))


def test_top_p(logits: torch.Tensor) -> None:
    probabilities, order = torch.softmax(logits.double(), -1).sort(descending=True)
    keep = torch.zeros(V)
    keep[order[probabilities.cumsum(0) - probabilities < 0.8]] = 1
    chi_square(frequencies(EngineSampling(seed=2, top_p=0.8), logits), exact(logits, keep=keep))


def test_top_p_beyond_the_candidates() -> None:
    """A flat distribution over a vocabulary far larger than what top-p looks at first."""
    weights = torch.ones(20_000)
    edge = nucleus_edge(weights, 0.9)
    assert edge == 1
    weights = torch.linspace(1, 2, 20_000)
    edge = nucleus_edge(weights, 0.5)
    assert weights[weights >= edge].sum() >= 0.5 * weights.sum()
    assert weights[weights > edge].sum() < 0.5 * weights.sum() + 1


def test_min_p(logits: torch.Tensor) -> None:
    probabilities = torch.softmax(logits, -1)
    keep = (probabilities >= 0.2 * probabilities.max()).double()
    chi_square(frequencies(EngineSampling(seed=3, min_p=0.2), logits), exact(logits, keep=keep))


def test_rows_do_not_touch_each_other(logits: torch.Tensor) -> None:
    """A row alone draws what it draws beside rows that ask for everything."""
    mine = EngineSampling(seed=5, temperature=0.7, top_p=0.9)
    greedy = EngineSampling(temperature=0.0)
    others = [
        EngineSampling(seed=1, allowed_token_ids=TokenSet.of((4,))),
        EngineSampling(seed=1, bad_words=((5,),), logit_bias={3: 100.0}),
        EngineSampling(seed=1, repetition_penalty=50.0, top_k=1),
        EngineSampling(seed=1, logprobs=20, min_tokens=5, stop_token_ids=(7,)),
    ]
    alone = draw(sampler_for(mine), logits[None], [17])[0]
    beside = draw(sampler_for(greedy, *others, mine), torch.stack([logits] * 6), [17] * 6)
    assert beside[-1] == alone
    assert beside[0] == int(logits.argmax())
    assert beside[1] == 4
    assert beside[2] == 3


def test_penalties_are_the_fields_own(logits: torch.Tensor) -> None:
    """Repetition counts prompt and output, presence and frequency only the output; twice, so that state counts."""
    params = EngineSampling(
        temperature=0.0, repetition_penalty=1.7, presence_penalty=0.9, frequency_penalty=0.4, logprobs=0
    )
    log, num_prompt = [3, 3, 8, 9, 9, 9, 12], 3
    sampler = sampler_for(params, tokens=log, num_prompt=num_prompt)
    for _ in range(6):
        expected = logits.clone()
        for token in set(log):
            expected[token] = expected[token] / 1.7 if expected[token] > 0 else expected[token] * 1.7
        for token in set(log[num_prompt:]):
            expected[token] -= 0.9 + 0.4 * log[num_prompt:].count(token)
        [token] = draw(sampler, logits[None])
        assert token == int(expected.argmax())
        log.append(token)


def test_bad_words_need_their_beginning(logits: torch.Tensor) -> None:
    best, second = logits.topk(2).indices.tolist()
    banned = EngineSampling(temperature=0.0, bad_words=((1, 2, best),))
    assert draw(sampler_for(banned, tokens=[9, 1, 2]), logits[None]) == [second]
    assert draw(sampler_for(banned, tokens=[9, 2, 1]), logits[None]) == [best]


def test_tokens_that_the_model_has_no_logits_of_are_never_drawn_anyway(logits: torch.Tensor) -> None:
    words, ends = ((V,), (3, V + 2), (V, 4)), (V + 1, 7)
    sampler = sampler_for(EngineSampling(temperature=0.0, bad_words=words, min_tokens=1, stop_token_ids=ends))
    best = int(logits.argmax())
    logits[7] = 9.0
    assert draw(sampler, logits[None]) == [best]


def test_min_tokens_keeps_the_end_away(logits: torch.Tensor) -> None:
    best, second = logits.topk(2).indices.tolist()
    sampler = sampler_for(EngineSampling(temperature=0.0, min_tokens=2, stop_token_ids=(best,)))
    assert [draw(sampler, logits[None], [position])[0] for position in (3, 4, 5)] == [second, second, best]


def test_logprobs_are_raw(logits: torch.Tensor) -> None:
    params = EngineSampling(temperature=0.3, seed=4, logprobs=5, logit_bias={1: 50.0})
    sampler = sampler_for(params)
    drawn = drawn_at(sampler, logits[None], Places.alone(np.zeros(1, np.int32), np.zeros(1, np.int32)))
    assert drawn.scores is not None
    [(_, width, _)] = drawn.scored
    scores, truth = drawn.scores.read(slice(0, 1), width), torch.log_softmax(logits, -1)
    assert drawn.tokens.tolist() == [1]
    assert scores.logprobs[0] == pytest.approx(float(truth[1]), abs=1e-5)
    assert scores.ranks[0] == int((logits > logits[1]).sum()) + 1
    assert scores.top_ids[0].tolist() == truth.topk(5).indices.tolist()
    np.testing.assert_allclose(scores.top_logprobs[0], truth.topk(5).values, atol=1e-5)


@pytest.mark.parametrize("vocabulary", [151936, 50257])
def test_logprobs_of_a_row_are_the_same_bits_beside_others(vocabulary: int) -> None:
    logits = 3 * torch.randn((8, vocabulary), generator=torch.Generator().manual_seed(0))
    chosen = torch.arange(8)
    together = token_scores(logits, chosen, 2)
    exact = logits.double().log_softmax(-1)
    torch.testing.assert_close(together.logprobs.double(), exact[chosen, chosen], rtol=0, atol=3e-5)
    torch.testing.assert_close(together.top_logprobs.double(), exact.topk(2).values, rtol=0, atol=3e-5)
    for row in range(8):
        alone = token_scores(logits[row : row + 1], chosen[row : row + 1], 2)
        for name in ("logprobs", "ranks", "top_ids", "top_logprobs"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[row]), name


def test_a_row_without_a_finite_logit_fails_alone(logits: torch.Tensor) -> None:
    nothing = EngineSampling(
        temperature=1.0, allowed_token_ids=TokenSet.of((4,)), bad_words=((4,),), logprobs=2, repetition_penalty=1.5
    )
    broken = torch.stack([logits, logits, torch.full((V,), math.nan)])
    sampler = sampler_for(EngineSampling(seed=9), nothing, EngineSampling(seed=9))
    drawn = drawn_at(sampler, broken, Places.alone(np.arange(3, dtype=np.int32), np.zeros(3, np.int32)))
    assert drawn.tokens[1:].tolist() == [-1, -1]
    assert drawn.tokens[0] == draw(sampler_for(EngineSampling(seed=9)), logits[None])[0]


class Operations(TorchDispatchMode):
    """Counts what a device would run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_rows_are_taken_together() -> None:
    """As many operations for many as for a few, where the tables are long enough; a row takes its last request."""
    kinds = [
        EngineSampling(repetition_penalty=1.4, bad_words=((1, 2, 3),)),
        EngineSampling(allowed_token_ids=TokenSet.of((4, 8)), frequency_penalty=0.3),
        EngineSampling(logit_bias={3: 2.5}),
    ]
    news = [NewRow(row, kinds[row % 3], 1, np.array([row, 1, 2], np.int32)) for row in range(48)]
    sampler = sampler_for(*[kinds[0]] * 48)
    counts = []
    for some in (news[:3], news):
        with Operations() as operations:
            sampler.set_rows(some)
        counts.append(operations.count)
    assert counts[0] == counts[1] > 0
    logits = torch.randn(48, V)
    together = draw(sampler, logits)
    apart = Sampler(48, V, torch.device("cpu"), TorchBackend())
    for new in news:
        apart.set_rows([NewRow(new.row, kinds[1], 1, new.tokens), new])
    assert together == draw(apart, logits)


def test_rows_that_change_their_logits_are_computed_together() -> None:
    """As many operations for many of them as for two; and each row gets what it gets alone."""
    kinds = [
        EngineSampling(temperature=0, repetition_penalty=1.4, frequency_penalty=0.3, presence_penalty=-0.2),
        EngineSampling(temperature=0, logit_bias={3: 2.5, 9: -4.0}, repetition_penalty=0.8),
        EngineSampling(temperature=0, allowed_token_ids=TokenSet.of((4, 8, 15, 16, 23, 42)), presence_penalty=1.0),
        EngineSampling(temperature=0, bad_words=((7,), (9,)), min_tokens=9, stop_token_ids=(5, 6)),
    ]
    counts = {}
    for rows in (4, 40):
        sampler = sampler_for(*(kinds * (rows // 4)), tokens=[1, 2, 2, 7], num_prompt=2)
        seen = []
        for step in range(4):
            logits = torch.randn(rows, V, generator=torch.Generator().manual_seed(step))
            with Operations() as operations:
                seen.append(draw(sampler, logits))
        counts[rows] = operations.count
        for row in range(rows):
            alone = sampler_for(kinds[row % 4], tokens=[1, 2, 2, 7], num_prompt=2)
            for step in range(4):
                logits = torch.randn(rows, V, generator=torch.Generator().manual_seed(step))
                assert draw(alone, logits[row : row + 1]) == [seen[step][row]]
    assert counts[4] + 10 > counts[40]  # np.repeat and the like are the host's
