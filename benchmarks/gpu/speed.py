"""How fast a model with random weights starts, prefills and decodes, against floors. A measure: see findings.py.

The floor of a decoding step is its bytes (every weight that is read, every key, value and state of the contexts) over
the copy bandwidth; that of a prompt is its products over the matrix rate.
"""

import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from findings import tell
from models import add, prompts, runner_of
from quire_engine.config import SchedulerLimits
from quire_engine.engine import Engine
from quire_engine.execution.runner import ModelRunner
from quire_engine.memory.dry_run import DryGroup, allocated
from quire_engine.models.families import spec_of
from quire_engine.quantization.config import quantization_of
from quire_engine.step import StepResult
from quire_engine.weights.hf_config import completed
from quire_kernels.hardware import hardware
from shapes import SHAPES

PROFILED = 8  # steps


class TimedRunner(ModelRunner):
    """Knows how long capturing and warming up took: the rest of its start is loading."""

    capture_seconds = warm_up_seconds = 0.0

    def capture_graphs(self, *arguments: Any) -> None:
        """As the runner's."""
        begun = time.perf_counter()
        super().capture_graphs(*arguments)
        self.capture_seconds = time.perf_counter() - begun

    def warm_up(self) -> None:
        """As the runner's."""
        begun = time.perf_counter()
        super().warm_up()
        self.warm_up_seconds = time.perf_counter() - begun


class Watched:
    """A runner as an engine sees it, and how long the last step waited for the device."""

    def __init__(self, runner: ModelRunner) -> None:
        self.limits: SchedulerLimits = runner.limits
        self.submit, self.close = runner.submit, runner.close
        self._runner = runner
        self.waited = 0.0

    def collect(self) -> StepResult:
        """As the runner's."""
        begun = time.perf_counter()
        result = self._runner.collect()
        self.waited = time.perf_counter() - begun
        return result


@dataclasses.dataclass(frozen=True)
class Work:
    """What a model's steps cost at least."""

    weights: int  # bytes
    parameters: int
    embedding: int  # bytes of rows that are looked up
    expert_parameters: int  # of all experts
    experts: int
    top_k: int
    expert_bytes: float  # a parameter of theirs
    token_bytes: float  # of cache, for each token of a context
    state_bytes: int  # for each request

    @staticmethod
    def of(shape: str, runner: ModelRunner, options: dict[str, Any], expert_bytes: float) -> "Work":
        """From shapes alone, and the runner's plan."""
        spec = spec_of(completed(SHAPES[shape]))
        found = allocated(
            spec,
            quantization_of(SHAPES[shape], options.get("quantization")),
            DryGroup(dtype=torch.bfloat16),
            runner.limits,
            chip=None if runner.device.type == "cpu" else hardware(runner.device),
            dtype=torch.bfloat16,
        )
        experts, inner, held, top_k = spec.experts, 0, 1, 1
        if experts is not None:
            layers = sum(spec.has_experts(layer) for layer in range(spec.num_layers))
            inner = layers * 3 * spec.hidden_size * experts.intermediate_size
            held, top_k = experts.num_experts, experts.top_k
        memory = runner.memory
        return Work(
            weights=memory.weight_bytes,
            parameters=found.parameters,
            embedding=0 if spec.tie_embeddings else 2 * spec.vocab_size * spec.hidden_size,
            expert_parameters=inner * held if experts is not None else 0,
            experts=held,
            top_k=top_k,
            expert_bytes=expert_bytes,
            token_bytes=memory.page_bytes / memory.block_size,
            state_bytes=memory.state_bytes,
        )

    def decode_bytes(self, requests: int, context: float) -> float:
        """Of a step; experts are read that at least one token has, if it chooses by chance."""
        idle = (1 - self.top_k / self.experts) ** requests if self.expert_parameters else 0.0
        read = self.weights - self.embedding - self.expert_parameters * idle * self.expert_bytes
        return read + requests * (context * self.token_bytes + 2 * self.state_bytes)

    def prefill_operations(self, tokens: int) -> float:
        """Products with weights alone."""
        idle = self.expert_parameters * (1 - self.top_k / self.experts)
        return 2 * tokens * (self.parameters - self.embedding / 2 - idle)


def timed(runner: ModelRunner, requests: int, prompt: int, new_tokens: int, seed: int) -> tuple[float, float]:
    """Seconds that as many random prompts take in all, and until the first has its first token."""
    engine = Engine(runner)
    add(engine, prompts(requests, prompt, runner.spec.vocab_size, seed), new_tokens)
    begun, first = time.perf_counter(), 0.0
    while engine.has_work:
        outcome = engine.step()
        if outcome.tokens and not first:
            first = time.perf_counter() - begun
    return time.perf_counter() - begun, first


def steps(runner: ModelRunner, requests: int, prompt: int, new_tokens: int, profiles: bool) -> dict[str, Any]:
    """Of decoding, all requests at once: a step's time, what of it the host works, and a profile of a few."""
    watched = Watched(runner)
    engine = Engine(watched)
    add(engine, prompts(requests, prompt, runner.spec.vocab_size, seed=requests), new_tokens)
    times: list[float] = []
    host: list[float] = []
    profile: dict[str, Any] = {}
    last = time.perf_counter()
    while engine.has_work:
        everyone = len(engine.step().tokens) == requests
        now = time.perf_counter()
        if everyone:
            times.append(now - last)
            host.append(now - last - watched.waited)
        last = now
        if everyone and profiles and not profile and len(times) >= new_tokens // 2:
            profile = _profile(engine)
            last = time.perf_counter()
    decoding = times[2:-2]  # a first step waits for a prompt's
    if not decoding:
        return {}
    return {"step_ms": statistics.median(decoding) * 1e3, "host_ms": statistics.median(host[2:-2]) * 1e3} | profile


def _profile(engine: Engine) -> dict[str, Any]:
    """A step's time in kernels and in gaps between them, and the largest gap inside a step."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(PROFILED):
            engine.step()
        torch.cuda.synchronize()
    kernels = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in found.profiler.kineto_results.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA and "Mem" not in event.name()
    )
    busy = sum(end - start for start, end in kernels)
    gaps = sorted(max(0, after[0] - before[1]) for before, after in itertools.pairwise(kernels))
    inside = gaps[: len(gaps) - 3 * PROFILED]  # the largest lie between steps, where sampling is launched
    return {
        "kernels_ms": busy / PROFILED / 1e6,
        "gaps_ms": sum(gaps) / PROFILED / 1e6,
        "largest_gap_inside_us": (inside[-1] if inside else 0) / 1e3,
        "kernels_per_step": len(kernels) / PROFILED,
    }


def fitting(runner: ModelRunner, requests: int, tokens: int) -> int:
    """As many of the requests as can run at once with so many tokens each."""
    limits = runner.limits
    most = min(requests, limits.max_num_seqs, limits.num_pages // -(-tokens // limits.block_size))
    return max(1, min(most, limits.num_states) if limits.num_states else most)


@contextmanager
def found(what: str) -> Iterator[dict[str, Any]]:
    """Tells the figures that are filled in, or why there are none."""
    figures: dict[str, Any] = {}
    try:
        yield figures
    except Exception as error:
        tell(what, False, f"{type(error).__name__}: {error}")
    else:
        tell(what, None, **figures)


def main(
    shape: str,
    device: str,
    concurrency: list[int],
    prompt: int,
    new_tokens: int,
    rates: dict[str, float],
    expert_bytes: float = 2.0,
    name: str = "",
    **options: Any,
) -> None:
    """Start, prefill, first token, decode at each concurrency, memory. `options`: the engine's."""
    name = name or shape
    if device == "cuda":
        torch.cuda.init()
    begun = time.perf_counter()
    runner = runner_of(
        shape,
        device,
        TimedRunner,
        dtype="bfloat16",
        max_model_len=2 * (prompt + new_tokens),
        **options,
    )
    assert isinstance(runner, TimedRunner)
    whole = time.perf_counter() - begun
    parts = {"capture_s": runner.capture_seconds, "warm_up_s": runner.warm_up_seconds}
    tell(f"{name}, start", None, seconds=whole, weights_s=whole - sum(parts.values()), **parts)
    work = Work.of(shape, runner, options, expert_bytes)
    with found(f"{name}, one prompt of {prompt}") as figures:
        timed(runner, 1, prompt, 2, seed=1)  # what the first request alone pays for
        figures["first_token_ms"] = timed(runner, 1, prompt, 1, seed=2)[1] * 1e3
    for wanted in concurrency:
        requests = fitting(runner, wanted, prompt + new_tokens)
        with found(f"{name}, {wanted} requests") as figures:
            if requests < wanted:
                figures["at_once"] = requests  # more do not fit
            prefill, _ = timed(runner, requests, prompt, 1, seed=3)
            all_of_it, _ = timed(runner, requests, prompt, new_tokens, seed=4)
            figures["tokens_per_s"] = requests * (new_tokens - 1) / max(all_of_it - prefill, 1e-9)
            figures["prefill_tokens_per_s"] = requests * prompt / prefill
            figures |= steps(runner, requests, prompt, new_tokens, profiles=device == "cuda")
            if "bytes" in rates and "step_ms" in figures:
                floor = work.decode_bytes(requests, prompt + new_tokens / 2) / rates["bytes"]
                figures |= {"floor_ms": floor * 1e3, "of_floor": floor * 1e3 / figures["step_ms"]}
            matrix = rates.get("fp8" if options.get("quantization") == "fp8" else "bf16")
            if matrix:
                figures["prefill_of_matrix_rate"] = work.prefill_operations(requests * prompt) / prefill / matrix
    memory = runner.memory
    planned = memory.weight_bytes + memory.cache_bytes + memory.activation_bytes
    figures = {"planned_gib": planned / 2**30, "pages": runner.limits.num_pages}
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        figures |= {"reserved_gib": torch.cuda.max_memory_reserved() / 2**30, "card_used_gib": (total - free) / 2**30}
    tell(f"{name}, memory", None, **figures)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
