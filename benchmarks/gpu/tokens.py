"""Whether a small model on the device says what it says on the CPU. A measure: see findings.py.

In float32 every token must be the CPU's. In 16 bits tokens may part where two are nearly as likely, so the claim is
another: the log-probabilities that the device gives its own tokens lie as near to those that the CPU in float32 gives
them, in the mean square, as the CPU's in the same 16 bits do, or at most twice as far; and each token is the likeliest
in float32 too, as far as that spread can tell. (An error in one log-probability of ten such spreads is not to be had
by chance in some hundred tokens, and the likeliest of two parts by the sum of two.) Where experts are chosen a choice
may tip over, which moves a log-probability by a tenth or so, here and there; logits of these models vary by 0.3.
"""

import json
import sys
from dataclasses import dataclass
from typing import Any

import torch
from findings import tell
from models import add, prompts, runner_of, shown
from quire_engine.engine import Engine
from quire_engine.models.families import spec_of
from quire_engine.weights.hf_config import completed
from shapes import SHAPES

PROMPT = 50
WAYS: dict[str, dict[str, Any]] = {
    "kernel by kernel": {"enforce_eager": True, "async_scheduling": False},
    "overlapped": {"enforce_eager": True},
    "graphs": {"async_scheduling": False},
    "graphs, overlapped": {},
    "deterministic": {"deterministic": True, "enforce_eager": True, "async_scheduling": False},
    "deterministic, graphs, overlapped": {"deterministic": True},
}
Scored = tuple[list[list[int]], torch.Tensor]  # logs, and the log-probability of each new token [requests, new tokens]


@dataclass(frozen=True)
class Load:
    """Requests of 50 tokens that generate so many."""

    shape: str
    requests: int
    new_tokens: int


def generate(load: Load, device: str, **options: Any) -> Scored:
    """In chunks, eight at a time, with too few pages for all."""
    engine = Engine(_runner(load.shape, device, **options))
    vocabulary: int = completed(SHAPES[load.shape])["vocab_size"]
    logs = prompts(load.requests, PROMPT, vocabulary)
    images = shown(load.shape, logs)
    spans = {number: span for number, (span, _) in images.items()}
    requests = add(engine, logs, load.new_tokens, spans, logprobs=1)
    found: list[list[float]] = [[] for _ in requests]
    while engine.scheduler.requests:
        outcome = engine.step()
        for request, key in outcome.wanted:
            engine.scheduler.provide(key, images[request.id][1])
        for request, logprobs in outcome.logprobs:
            found[request.id].append(float(logprobs.logprobs[0]))
        engine.scheduler.check_integrity()
    return [request.tokens for request in requests], torch.tensor(found)


def score(shape: str, logs: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the CPU thinks of the new tokens in float32: their log-probabilities, and how far the best is above."""
    engine = Engine(_runner(shape, "cpu", dtype="float32", enable_prefix_caching=False))
    images = shown(shape, logs)
    add(engine, logs, 1, {number: span for number, (span, _) in images.items()}, prompt_logprobs=1)
    found = torch.zeros(len(logs), len(logs[0]))
    best = torch.zeros_like(found)
    while engine.scheduler.requests:
        outcome = engine.step()
        for request, key in outcome.wanted:
            engine.scheduler.provide(key, images[request.id][1])
        for request, first, logprobs in outcome.prompt_logprobs:
            places = slice(first + 1, first + 1 + len(logprobs.logprobs))  # the first token has none
            found[request.id, places] = torch.from_numpy(logprobs.logprobs)
            best[request.id, places] = torch.from_numpy(logprobs.top_logprobs[:, 0])
    return found[:, PROMPT:], (best - found)[:, PROMPT:]


def _runner(shape: str, device: str, **options: Any) -> Any:
    return runner_of(
        shape,
        device,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        max_model_len=256,
        kv_cache_memory_bytes=1 << 20,
        cpu_threads=2,  # others are at work beside this
        **options,
    )


def spread(shape: str, scored: Scored) -> tuple[float, float]:
    """The root mean square of the distances to float32's log-probabilities, and how far a token is from the best."""
    logs, given = scored
    expected, behind = score(shape, logs)
    return (given - expected).square().mean().sqrt().item(), behind.max().item()


def ways_of(shape: str, backend: str) -> dict[str, dict[str, Any]]:
    """Latent attention is not to be had deterministic; torch's operators neither so nor as graphs."""
    latent = spec_of(completed(SHAPES[shape])).latent is not None
    left_out = ("graphs", "deterministic") if backend == "torch" else ("deterministic",) if latent else ()
    return {name: options for name, options in WAYS.items() if not any(word in name for word in left_out)}


def main(shape: str, backend: str, device: str, dtypes: list[str], requests: int, new_tokens: int) -> None:
    """Every dtype and way. What fails is a finding."""
    load = Load(shape, requests, new_tokens)
    exact, _ = generate(load, "cpu", dtype="float32")
    tips = 0.1 if spec_of(completed(SHAPES[shape])).experts is not None else 0.0
    for dtype in dtypes:
        allowed = spread(shape, generate(load, "cpu", dtype=dtype))[0] if dtype != "float32" else 0.0
        kept: dict[bool, Scored] = {}
        for way, options in ways_of(shape, backend).items():
            what = f"{shape}, {backend}, {dtype}, {way}"
            try:
                scored = generate(load, device, dtype=dtype, attention_backend=backend, **options)
                logs = torch.tensor([scored[0], exact])[:, :, PROMPT:]
                figures: dict[str, Any] = {"same_tokens": (logs[0] == logs[1]).float().mean().item()}
                if dtype == "float32":
                    right = scored[0] == exact
                else:
                    far, behind = spread(shape, scored)
                    figures |= {"spread": far, "cpu_spread": allowed, "behind_best": behind}
                    right = far <= 2 * allowed + tips / 10 and behind <= 20 * allowed + tips
                deterministic = "deterministic" in options
                before = kept.setdefault(deterministic, scored)
                if deterministic:  # the same bits, however it runs
                    right = right and before[0] == scored[0] and torch.equal(before[1], scored[1])
                tell(what, right, **figures)
            except Exception as error:
                tell(what, False, f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
