"""Every family equals transformers: logits, and greedy tokens however the work is cut up."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quire_engine.config import EngineConfig
from quire_engine.engine import Engine
from quire_engine.execution.runner import ModelRunner
from quire_engine.request import Request
from quire_engine.sampling.params import EngineSampling
from quire_engine.weights.resolve import find_model
from transformers import AutoModelForCausalLM

Make = Callable[[str], Path]
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral"]
LENGTHS = (1, 5, 16, 33, 70)
NEW_TOKENS = 32


def prompts(seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(4, 300, length).tolist() for length in LENGTHS]


def truth(folder: Path, prompt: list[int]) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    out = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        use_cache=True,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def run(engine: Engine, batch: list[list[int]], first_id: int = 1, **params: Any) -> list[list[int]]:
    sampling = EngineSampling(**({"temperature": 0.0, "max_tokens": NEW_TOKENS} | params))
    requests = [Request(first_id + i, list(prompt), len(prompt), sampling) for i, prompt in enumerate(batch)]
    for request in requests:
        engine.add(request)
    while engine.has_work:
        engine.step()
    engine.scheduler.check_integrity()
    return [request.tokens[request.num_prompt :] for request in requests]


def engine_for(folder: Path, **options: Any) -> Engine:
    config = EngineConfig(model=str(folder), **({"kv_cache_memory_bytes": 8 << 20, "device": "cpu"} | options))
    return Engine(ModelRunner(config, find_model(config)))


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits(checkpoint: Make, family: str, backend: str) -> None:
    """Of every position of a prompt, through the prompt's log-probabilities over the whole vocabulary."""
    folder = checkpoint(family)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    runner = engine_for(folder, attention_backend=backend)._executor
    seen: list[torch.Tensor] = []
    logits_of = runner._model.logits
    runner._model.logits = lambda hidden: seen.append(logits_of(hidden)) or seen[-1]
    for number, prompt in enumerate(prompts()):
        seen.clear()
        engine = Engine(runner)
        engine.add(
            Request(
                number,
                list(prompt),
                len(prompt),
                EngineSampling(temperature=0.0, max_tokens=1, prompt_logprobs=1),
            )
        )
        while engine.has_work:
            engine.step()
        ours = torch.cat(seen)
        with torch.no_grad():
            theirs = model(torch.tensor([prompt])).logits[0]
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens(checkpoint: Make, family: str) -> None:
    """Alone, batched, in chunks of 7, from the prefix cache, and with pages for only two of them at a time."""
    folder = checkpoint(family)
    batch = prompts()
    expected = [truth(folder, prompt) for prompt in batch]
    engine = engine_for(folder)
    assert [run(engine, [prompt], 100 + i)[0] for i, prompt in enumerate(batch)] == expected
    assert engine.scheduler.stats.prefix_hits == 0
    assert run(engine, batch, 200) == expected
    assert engine.scheduler.stats.prefix_hits == 32 + 64, "the second run finds the first one's blocks"
    assert run(engine_for(folder, max_num_batched_tokens=7), batch) == expected
    page = 2 * 3 * 2 * 16 * (32 if family in ("mistral", "qwen3", "qwen3_moe") else 16) * 4
    tight = engine_for(folder, kv_cache_memory_bytes=9 * page, max_model_len=128)
    assert tight.scheduler.limits.num_pages == 9
    assert run(tight, batch) == expected
    assert tight.scheduler.stats.preemptions > 0, "nine pages were not tight enough"


def test_triton_attention_under_the_interpreter(checkpoint: Make) -> None:
    """Ties the Triton kernel to the engine."""
    folder = checkpoint("mistral")
    batch = prompts()[1:4]
    engine = engine_for(folder, attention_backend="triton", max_num_batched_tokens=24)
    assert run(engine, batch, max_tokens=6) == [truth(folder, prompt)[:6] for prompt in batch]


def test_prompt_logprobs_are_reported_once(checkpoint: Make) -> None:
    """Also when preemption computes a prompt again, and in chunks; equal to transformers' within 1e-4."""
    folder = checkpoint("llama")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    page = 2 * 3 * 2 * 16 * 16 * 4
    engine = engine_for(folder, kv_cache_memory_bytes=9 * page, max_model_len=128, max_num_batched_tokens=24)
    batch = [prompt for prompt in prompts() if len(prompt) > 1]
    found: dict[int, list[tuple[int, float]]] = {}
    for number, prompt in enumerate(batch):
        params = EngineSampling(temperature=0.0, max_tokens=NEW_TOKENS, prompt_logprobs=0)
        engine.add(Request(number, list(prompt), len(prompt), params))
    while engine.has_work:
        for request, first, scores in engine.step().prompt_logprobs:
            known = found.setdefault(request.id, [])
            assert first == len(known)
            known += zip(scores.chosen.tolist(), scores.logprobs.tolist(), strict=True)
    assert engine.scheduler.stats.preemptions > 0
    for number, prompt in enumerate(batch):
        assert [token for token, _ in found[number]] == prompt[1:]
        with torch.no_grad():
            truth = torch.log_softmax(model(torch.tensor([prompt])).logits[0, :-1], -1)
        expected = truth.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        ours = torch.tensor([value for _, value in found[number]])
        assert (ours - expected).abs().max() < 1e-4
