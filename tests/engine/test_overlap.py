"""Steps that overlap, and steps replayed from padded buffers, give the tokens of plain ones."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drafters import speculation
from quire_engine.batch import Shape
from quire_engine.config import EngineConfig
from quire_engine.engine import Engine
from quire_engine.execution.runner import ModelRunner
from quire_engine.memory.shapes import decode_ladder, mixed_ladder
from quire_engine.request import EngineSampling, Request
from quire_engine.speculation.ngram import NgramDrafter
from quire_engine.speculation.speculation import Speculation
from quire_engine.weights.resolve import find_model

Make = Callable[[str], Path]


def runner_for(folder: Path, **options: Any) -> ModelRunner:
    config = EngineConfig(
        model=str(folder),
        device="cpu",
        max_model_len=128,
        **({"max_num_seqs": 6, "max_num_batched_tokens": 40, "kv_cache_memory_bytes": 1 << 20} | options),
    )
    return ModelRunner(config, find_model(config))


def pressed(runner: ModelRunner) -> ModelRunner:
    """With pages for about three requests, and no state to spare for all of them."""
    runner.limits = replace(runner.limits, num_pages=9, num_states=min(4, runner.limits.num_states))
    return runner


def clear(runner: ModelRunner) -> None:
    """As a GPU's caches are, for padding reads page 0."""
    for cache in runner._caches:
        for part in cache:
            part.zero_()


def random_params(generator: np.random.Generator, number: int) -> EngineSampling:
    """Greedy, seeded, filtered, penalized, biased and scored requests, some that stop early."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.9, "top_p": 0.9, "top_k": 20},
        {"temperature": 1.2, "min_p": 0.05, "logprobs": 2},
        {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "logprobs": 0},
        {"temperature": 0.0, "bad_words": ((5,), (6, 7)), "logit_bias": {8: 1.5}, "min_tokens": 4},
        {"temperature": 0.8, "prompt_logprobs": 1},
    ]
    return EngineSampling(
        max_tokens=int(generator.integers(1, 60)),
        seed=number,
        stop_token_ids=tuple(generator.integers(4, 300, 4).tolist()),
        **kinds[number % len(kinds)],
    )


Lived = dict[int, tuple[list[int], str | None, list[float]]]


def live(runner: ModelRunner, seed: int, guesses: Speculation | None = None) -> Lived:
    """Random arrivals and aborts."""
    generator = np.random.default_rng(seed)
    engine = Engine(pressed(runner), guesses)
    shared = generator.integers(4, 300, 32).tolist()
    requests: dict[int, Request] = {}
    scores: dict[int, list[float]] = {}
    arrivals = iter(range(24))
    aborted: set[int] = set()
    while True:
        number = next(arrivals, None)
        if number is None and not engine.has_work:
            break
        if number is not None:
            prompt = shared[: int(generator.integers(0, 33))] + generator.integers(4, 300, 7).tolist()
            requests[number] = Request(number, prompt, len(prompt), random_params(generator, number))
            engine.add(requests[number])
            if generator.random() < 0.2:
                victim = int(generator.integers(0, number + 1))
                aborted.add(victim)
                engine.abort(victim)
        for _ in range(2):
            outcome = engine.step()
            engine.scheduler.check_integrity()
            for request, found in outcome.logprobs:
                scores.setdefault(request.id, []).extend(found.logprobs.tolist())
    assert engine.scheduler.stats.preemptions > 0, "the pressure is gone"
    assert engine.scheduler.pool.num_used == 0
    assert engine.scheduler.states is None or engine.scheduler.states.pool.num_used == 0
    return {
        number: (request.tokens[request.num_prompt :], request.finish_reason, scores.get(number, []))
        for number, request in requests.items()
    }


@pytest.mark.parametrize(("family", "seed"), [("llama", 0), ("llama", 1), ("llama", 2), ("qwen3_5", 1), ("lfm2", 2)])
def test_overlapped_equals_plain(checkpoint: Make, family: str, seed: int) -> None:
    plain = live(runner_for(checkpoint(family), async_scheduling=False), seed)
    check_same(live(runner_for(checkpoint(family)), seed), plain)


def check_same(found: Lived, plain: Lived) -> None:
    assert any(reason == "stop" for _, reason, _ in plain.values())
    for number, (tokens, reason, scores) in plain.items():
        ours, our_reason, our_scores = found[number]
        if "abort" in (reason, our_reason):  # how far it came depends on when
            shorter = min(len(ours), len(tokens))
            assert ours[:shorter] == tokens[:shorter]
            continue
        assert (ours, our_reason) == (tokens, reason)
        np.testing.assert_allclose(our_scores, scores, atol=1e-4)


def replaying(step: Callable[[], None]) -> Callable[[], None]:
    """What a recorded graph does, without a GPU: the same operations on the same memory, outputs into the same place.

    Nothing of the step that replays it reaches it but what lies in its input buffer.
    """
    step()
    return step


@pytest.mark.parametrize(
    ("family", "backend", "rows"),
    [("llama", "native", 6), ("llama", "torch", 6), ("llama", "native", 32), ("qwen3_5", "native", 6)],
)
def test_replayed_equals_eager(checkpoint: Make, family: str, backend: str, rows: int) -> None:
    """Through every padded shape, decoding and mixed; of 32 rows also where as many draw as there are tokens."""
    options = {"attention_backend": backend, "max_num_seqs": rows}
    eager = live(runner_for(checkpoint(family), **options), 7)
    runner = runner_for(checkpoint(family), **options)
    clear(runner)
    runner.capture_graphs(replaying)
    used = shapes_used(runner)
    replayed = live(runner, 7)
    assert {shape.requests for shape in used} >= {4, rows + 1}
    assert len(used) >= 5, "too few shapes were used"
    for number, (tokens, reason, scores) in eager.items():
        assert replayed[number][:2] == (tokens, reason)
        np.testing.assert_allclose(replayed[number][2], scores, atol=1e-4)


def shapes_used(runner: ModelRunner) -> set[Shape]:
    """Those that will be replayed."""
    graphs = runner._graphs
    assert graphs is not None
    used: set[Shape] = set()
    fitting = graphs._fitting

    def noted(shape: Shape) -> Any:
        captured = fitting(shape)
        if captured is not None:
            used.add(captured.shape)
        return captured

    graphs._fitting = noted
    return used


@pytest.mark.parametrize("family", ["llama", "qwen3_5"])
def test_steps_with_drafts_are_replayed(checkpoint: Make, family: str) -> None:
    plain = live(runner_for(checkpoint(family), async_scheduling=False), 1)
    runner = runner_for(checkpoint(family), speculative_config='{"num_speculative_tokens": 4}')
    clear(runner)
    runner.capture_graphs(replaying)
    used = shapes_used(runner)
    check_same(live(runner, 1, speculation(NgramDrafter(1, 3))), plain)
    drafted = [shape for shape in used if shape.longest_query == 5]
    assert len(drafted) >= 2, "too few shapes were used"
    assert all(shape.draws == shape.tokens for shape in drafted)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"max_num_seqs": 1, "max_num_batched_tokens": 300}),
        ("qwen3_5", {"attention_backend": "torch"}),
        ("qwen3_5", {"attention_backend": "triton", "max_num_seqs": 2, "max_num_batched_tokens": 3}),
    ],
)
def test_warm_up_leaves_nothing_behind(checkpoint: Make, family: str, options: dict[str, Any]) -> None:
    def tokens(runner: ModelRunner) -> list[list[int]]:
        engine = Engine(runner)
        asked = ({}, {"bad_words": ((5, 6),), "presence_penalty": 1.0}, {"prompt_logprobs": 0, "min_tokens": 3})
        requests = [
            Request(n, [5, 6, 7, 5], 4, EngineSampling(temperature=0.0, max_tokens=4, stop_token_ids=(5, 6), **more))
            for n, more in enumerate(asked)
        ]
        for request in requests:
            engine.add(request)
        while engine.has_work:
            engine.step()
        return [request.tokens for request in requests]

    folder = checkpoint(family)
    runner = runner_for(folder, **options)
    clear(runner)
    runner.warm_up()
    assert not runner._sampler._edits
    assert not any(part[:-1].any() for cache in runner._caches for part in cache), "padding writes the last state alone"
    assert tokens(runner) == tokens(runner_for(folder))


def test_the_ladder_covers_every_batch() -> None:
    for most in (1, 5, 8, 256, 1000):
        sizes = decode_ladder(most)
        assert sizes[0] == 1
        assert sizes[-1] == most
        assert len(sizes) < 60
        for before, after in itertools.pairwise(sizes):
            assert after <= max(2 * before, before + 8, before * 9 // 8 + 1)


def test_small_mixed_steps_are_captured() -> None:
    """However many requests decode beside a prompt, in steps of up to 512 tokens."""
    shapes = mixed_ladder(8192, 256)
    assert len(shapes) < 12
    for requests in (1, 2, 31, 33, 100, 128, 129, 255, 256):
        for tokens in (requests + 1, requests + 100, 512):
            fitting = [s for s in shapes if tokens <= s.tokens and requests < s.requests and requests <= s.draws]
            assert tokens > 512 or fitting, (tokens, requests)


def test_log_probabilities_of_a_prompt_hold_up_no_later_step(checkpoint: Make) -> None:
    """Steps are replayed again as soon as the prompt is done, whether or not its request goes on."""
    runner = runner_for(checkpoint("llama"))
    clear(runner)
    runner.capture_graphs(replaying)
    graphs: Any = runner._graphs
    replayed: list[bool] = []
    execute = runner.execute

    def noted(plan: Any) -> Any:
        replayed.append(False)
        return execute(plan)

    def replay(plan: Any, places: Any) -> Any:
        found = type(graphs).replay(graphs, plan, places)
        replayed[-1] = found is not None
        return found

    runner.execute, graphs.replay = noted, replay
    engine = Engine(runner)
    prompt = list(range(4, 94))  # three steps of 40 tokens
    engine.add(Request(1, prompt, 90, EngineSampling(temperature=0.0, max_tokens=9, prompt_logprobs=1)))
    while engine.has_work:
        engine.step()
    assert replayed == [False] * 3 + [True] * 8


def test_tokens_stay_on_the_device(checkpoint: Make) -> None:
    """While a step is in flight the next plan names none of its tokens."""
    runner = runner_for(checkpoint("llama"))
    seen: list[bool] = []
    submit = runner.submit

    def noted(plan: Any) -> None:
        seen.append(bool((plan.token_ids < 0).any()))
        submit(plan)

    runner.submit = noted
    engine = Engine(runner)
    engine.add(Request(1, [5, 6, 7], 3, EngineSampling(temperature=0.0, max_tokens=8)))
    while engine.has_work:
        engine.step()
    assert seen == [False] + [True] * 7
    torch.testing.assert_close(runner._last_tokens[-1], torch.tensor(0, dtype=torch.int32))


@pytest.mark.parametrize(
    "family", ["qwen3_5", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mistral", "granite_hybrid"))]
)
def test_replayed_through_triton(checkpoint: Make, family: str) -> None:
    """Padding through the GPU's kernels: requests without tokens, tokens without a slot."""

    def tokens(runner: ModelRunner) -> list[list[int]]:
        engine = Engine(runner)
        generator = np.random.default_rng(3)
        requests = []
        for number, length in enumerate((5, 11, 20)):
            prompt = generator.integers(4, 300, length).tolist()
            params = EngineSampling(temperature=0.7 * (number == 1), seed=number, top_p=0.9, max_tokens=5)
            requests.append(Request(number, prompt, length, params))
            engine.add(requests[-1])
            engine.step()
        while engine.has_work:
            engine.step()
        return [request.tokens[request.num_prompt :] for request in requests]

    folder, sizes = (
        checkpoint(family),
        {"max_num_seqs": 3, "max_num_batched_tokens": 24, "kv_cache_memory_bytes": 1 << 20},
    )
    runner = runner_for(folder, attention_backend="triton", **sizes)
    clear(runner)
    runner.capture_graphs(replaying)
    assert runner._graphs is not None
    used: list[int] = []
    fitting = runner._graphs._fitting
    runner._graphs._fitting = lambda shape: used.append(shape.longest_query) or fitting(shape)
    assert tokens(runner) == tokens(runner_for(folder, **sizes))
    assert {1} < set(used), "decoding and mixed steps"
