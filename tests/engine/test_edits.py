"""What requests change in their logits, in lives of the engine, against plain Python over transformers' logits."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quire_engine.config import EngineConfig
from quire_engine.engine import Engine
from quire_engine.execution.runner import ModelRunner
from quire_engine.request import EngineSampling, Request, TokenSet
from quire_engine.weights.resolve import find_model

Make = Callable[[str], Path]
_OFTEN = 30  # requests speak of few tokens, so that what they forbid comes up


def edited(raw: np.ndarray, prompt: list[int], out: list[int], params: EngineSampling) -> np.ndarray:
    """The logits after `prompt` and `out`."""
    x, log = raw.copy(), prompt + out
    if params.allowed_token_ids:
        x[~np.isin(np.arange(len(x)), params.allowed_token_ids.ids())] = -np.inf
    for *begin, end in params.bad_words:
        if log[len(log) - len(begin) :] == begin:  # more than the log has never stands there
            x[end] = -np.inf
    if len(out) < params.min_tokens:
        x[list(params.stop_token_ids)] = -np.inf
    for token, bias in (params.logit_bias or {}).items():
        x[token] += bias
    for token in set(log):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in set(out):
        x[token] -= params.presence_penalty + params.frequency_penalty * out.count(token)
    return x


def random_params(generator: np.random.Generator, prompt: list[int]) -> EngineSampling:
    def tokens(count: int) -> tuple[int, ...]:
        return tuple(generator.integers(4, _OFTEN, count).tolist())

    def one_of(*values: Any) -> Any:
        return values[generator.integers(len(values))]

    asked: dict[str, Any] = {
        "bad_words": (*(tokens(one_of(1, 2, 2, 3, 20)) for _ in range(40)), (*prompt[-5:], *tokens(1))),
        "allowed_token_ids": TokenSet.of(tokens(one_of(1, 8, 20))),
        "logit_bias": {token: one_of(-100.0, 100.0, 1.5) for token in tokens(6)},
        "repetition_penalty": one_of(0.01, 1.3, 100.0),
        "presence_penalty": one_of(-2.0, 2.0),
        "frequency_penalty": one_of(-2.0, 2.0),
        "prompt_logprobs": 0,
    }
    chosen = {name: value for name, value in asked.items() if generator.random() < 0.35}
    least = one_of(0, 1, 20)
    most = int(generator.integers(max(least, 1), 45))
    stops = tokens(6)
    return EngineSampling(temperature=0.0, max_tokens=most, min_tokens=least, stop_token_ids=stops, **chosen)


@pytest.mark.parametrize("overlapped", [True, False])
def test_every_token_is_the_likeliest_of_those_left(checkpoint: Make, overlapped: bool) -> None:
    """Prompts in parts, prefixes shared, pages short: a request's edits are the same however it was computed."""
    from transformers import AutoModelForCausalLM

    folder = checkpoint("llama")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    config = EngineConfig(
        model=str(folder),
        device="cpu",
        max_model_len=128,
        max_num_seqs=6,
        max_num_batched_tokens=24,
        kv_cache_memory_bytes=1 << 20,
        async_scheduling=overlapped,
    )
    runner = ModelRunner(config, find_model(config))
    runner.limits = replace(runner.limits, num_pages=9)
    engine = Engine(runner)
    generator = np.random.default_rng(0)
    shared = generator.integers(4, _OFTEN, 40).tolist()
    requests = []
    for number in range(24):
        prompt = shared[: generator.integers(41)] + generator.integers(4, _OFTEN, generator.integers(1, 30)).tolist()
        requests.append(Request(number, list(prompt), len(prompt), random_params(generator, prompt)))
        engine.add(requests[-1])
        engine.step()
    while engine.has_work:
        engine.step()
    assert engine.scheduler.stats.preemptions > 0, "the pressure is gone"
    for request in requests:
        prompt, out, params = request.tokens[: request.num_prompt], request.tokens[request.num_prompt :], request.params
        with torch.inference_mode():
            logits = model(torch.tensor([request.tokens])).logits[0].numpy()
        for place, token in enumerate(out):
            left = edited(logits[len(prompt) - 1 + place], prompt, out[:place], params)
            assert left[token] >= left.max() - 1e-3 > -np.inf
            stops = token in params.stop_token_ids and place >= params.min_tokens
            assert stops == (request.finish_reason == "stop" and place == len(out) - 1)
        if request.finish_reason == "error":
            assert edited(logits[-1], prompt, out, params).max() == -np.inf, "an error without a cause"
        elif request.finish_reason == "length":
            assert len(out) == params.max_tokens
    assert {request.finish_reason for request in requests} == {"stop", "length", "error"}
    resumed = []
    for request in requests:  # as where a replica was lost: min_tokens counts from the prompt's end all the same
        half = request.num_prompt + request.num_output // 2
        again = Request(100 + request.id, request.tokens[:half], request.num_prompt, request.params, resumed=True)
        resumed.append(again)
        engine.add(again)
    while engine.has_work:
        engine.step()
    assert [again.tokens for again in resumed] == [request.tokens for request in requests]
    assert [again.finish_reason for again in resumed] == [request.finish_reason for request in requests]
