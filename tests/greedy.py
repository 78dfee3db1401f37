"""Prompts, transformers' greedy tokens for them, and the engine's."""

from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quire_engine.config import EngineConfig
from quire_engine.engine import Engine
from quire_engine.execution.runner import ModelRunner
from quire_engine.request import EngineSampling, Request
from quire_engine.weights.resolve import find_model
from transformers import AutoModelForCausalLM

LENGTHS = (1, 5, 16, 33, 70)
NEW_TOKENS = 32


def prompts(seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(4, 300, length).tolist() for length in LENGTHS]


def truth(folder: Path, batch: list[list[int]]) -> list[list[int]]:
    """transformers' greedy tokens for each prompt."""
    return [list(_generated(folder, tuple(prompt))) for prompt in batch]


@lru_cache(maxsize=1)
def _reference(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@cache
def _generated(folder: Path, prompt: tuple[int, ...]) -> tuple[int, ...]:
    out = _reference(folder).generate(
        torch.tensor([prompt]),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        use_cache=True,
        pad_token_id=0,
    )
    return tuple(out[0, len(prompt) :].tolist())


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


def prompt_logits(engine: Engine, batch: list[list[int]]) -> list[torch.Tensor]:
    """Of every position of each prompt [length, vocabulary]."""
    runner: Any = engine._executor
    model = runner._model
    seen: list[torch.Tensor] = []
    logits_of = model.logits
    model.logits = lambda hidden, out: seen.append(logits_of(hidden, out)) or seen[-1]
    found = []
    for number, prompt in enumerate(batch):
        seen.clear()
        sampling = EngineSampling(temperature=0.0, max_tokens=1, prompt_logprobs=1)
        engine.add(Request(number, list(prompt), len(prompt), sampling))
        while engine.has_work:
            engine.step()
        found.append(torch.cat(seen))
    model.logits = logits_of
    return found
