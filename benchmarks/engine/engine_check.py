"""The engine on the GPU at hand: whether its ways of running agree, whether its memory is what was planned, and how
fast it decodes and prefills with random weights, against the floor and, where vLLM is installed, against it.

    make gpu-check                                           kernels first, then this
    python benchmarks/engine/engine_check.py --shapes Llama-3.1-8B --concurrency 1,64

The floor of a decoding step is its bytes (every weight that is read, every key and value of the contexts) over the
copy bandwidth, or its operations over the matrix rate, whichever takes longer; both rates are measured in this run.
"""

import argparse
import dataclasses
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from quire_engine.config import EngineConfig
from quire_engine.engine import Engine
from quire_engine.execution.dry_run import DryGroup, allocated
from quire_engine.execution.runner import ModelRunner
from quire_engine.models.spec import DecoderSpec
from quire_engine.plan import Target
from quire_engine.request import Request
from quire_engine.sampling.params import EngineSampling
from quire_engine.weights.resolve import find_model
from shapes import SHAPES

ROOT = Path(__file__).parents[2]
PROMPT, NEW_TOKENS = 1024, 256


def runner_for(shape: str, device: str, **options: Any) -> ModelRunner:
    """With random weights."""
    gc.collect()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[shape]))
        config = EngineConfig(model=folder, device=device, load_format="dummy", **options)
        return ModelRunner(config, find_model(config))


def add_requests(
    engine: Engine, count: int, prompt: int, new_tokens: int, vocabulary: int, seed: int = 0
) -> list[Request]:
    """Random prompts, none alike, that generate so many tokens."""
    generator = np.random.default_rng(seed)
    params = EngineSampling(temperature=0.0, max_tokens=new_tokens)
    requests = [
        Request(number, generator.integers(0, vocabulary, prompt).tolist(), prompt, params) for number in range(count)
    ]
    for request in requests:
        engine.add(request)
    return requests


# ---- whether it is right ------------------------------------------------------------


def tokens_of(device: str, **options: Any) -> list[list[int]]:
    """Greedy tokens of a small model with experts, in chunks, with too few pages for all."""
    runner = runner_for(
        "tiny",
        device,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        max_model_len=256,
        kv_cache_memory_bytes=1 << 20,
        **options,
    )
    engine = Engine(runner)
    requests = add_requests(engine, 12, 50, 40, 1024)
    while engine.has_work:
        engine.step()
        engine.scheduler.check_integrity()
    return [request.tokens[request.num_prompt :] for request in requests]


def correctness(device: str) -> dict[str, Any]:
    """Share of tokens, up to the first other one, that agree with the plain loop launched kernel by kernel."""
    plain = tokens_of(device, enforce_eager=True, async_scheduling=False, dtype="float32")
    found: dict[str, Any] = {}
    for name, options in {
        "overlapped": {"enforce_eager": True, "dtype": "float32"},
        "overlapped, graphs": {"dtype": "float32"},
        "torch's operators": {"enforce_eager": True, "dtype": "float32", "attention_backend": "torch"},
    }.items():
        ours = tokens_of(device, **options)
        same = sum(
            next((i for i, (a, b) in enumerate(zip(one, two, strict=True)) if a != b), len(two))
            for one, two in zip(ours, plain, strict=True)
        )
        found[name] = same / sum(map(len, plain))
    if device != "cpu":
        alone = tokens_of(device, deterministic=True)
        again = tokens_of(device, deterministic=True, enforce_eager=True, async_scheduling=False)
        found["deterministic, graphs and without"] = float(alone == again)
    return found


# ---- how fast ------------------------------------------------------------


@dataclasses.dataclass
class Rates:
    """What this device does today."""

    bytes: float  # per second: read and written by a copy
    operations: dict[str, float]  # per second, of a matrix product in a dtype

    @staticmethod
    def measure(device: str) -> "Rates":
        """About a second."""
        size = (1 << 30) if device == "cuda" else (1 << 26)
        source = torch.empty(size, dtype=torch.int8, device=device)
        target = torch.empty_like(source)
        found = Rates(2 * size / _seconds(lambda: target.copy_(source), device), {})
        n = 8192 if device == "cuda" else 1024
        a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
        found.operations["bfloat16"] = 2 * n**3 / _seconds(lambda: a @ a.T, device)
        if device == "cuda" and torch.cuda.get_device_capability() >= (8, 9):
            narrow, one = a.to(torch.float8_e4m3fn), torch.ones((), device=device)
            found.operations["fp8"] = (
                2
                * n**3
                / _seconds(
                    lambda: torch._scaled_mm(narrow, narrow.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16),
                    device,
                )
            )
        return found


def _seconds(work: Any, device: str) -> float:
    spent = []
    for _ in range(12):
        _wait(device)
        begun = time.perf_counter()
        work()
        _wait(device)
        spent.append(time.perf_counter() - begun)
    return statistics.median(spent[2:])


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def step_floor(
    spec: DecoderSpec, weights: int, requests: int, context: int, cache_itemsize: int, rates: Rates, fp8: bool
) -> float:
    """Seconds that a decoding step cannot do without."""
    item = 1 if fp8 else 2
    read = weights - spec.vocab_size * spec.hidden_size * 2 * (not spec.tie_embeddings)  # of the embedding: rows
    worked = read / item  # weights that each token is multiplied with
    if spec.experts is not None:
        experts, layers = spec.experts, spec.num_layers - len(spec.experts.dense_layers)
        one = layers * 3 * spec.hidden_size * experts.intermediate_size
        chosen = 1 - (1 - experts.top_k / experts.num_experts) ** requests  # by at least one token, if by chance
        read -= int(one * experts.num_experts * (1 - chosen)) * item
        worked -= one * (experts.num_experts - experts.top_k)
    cache = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * cache_itemsize * context * requests
    rate = rates.operations.get("fp8" if fp8 else "bfloat16", rates.operations["bfloat16"])
    return max((read + cache) / rates.bytes, 2 * requests * worked / rate)


def measure(
    shape: str, device: str, fp8: bool, concurrency: list[int], rates: Rates, small: bool
) -> list[dict[str, Any]]:
    """One model in one dtype, at each number of requests at once."""
    prompt, new_tokens = (32, 16) if small else (PROMPT, NEW_TOKENS)
    options: dict[str, Any] = {"quantization": "fp8", "kv_cache_dtype": "fp8"} if fp8 else {}
    if device == "cpu":
        options["kv_cache_memory_bytes"] = 64 << 20
    begun = time.perf_counter()
    before = torch.cuda.memory_reserved() if device == "cuda" else 0
    runner = runner_for(
        shape,
        device,
        max_model_len=2 * (prompt + new_tokens),
        max_num_seqs=max(concurrency),
        dtype="bfloat16",
        **options,
    )
    started = time.perf_counter() - begun
    spec = runner.spec
    quantization = runner.quantization
    target = Target.of(torch.device(device, 0) if device == "cuda" else torch.device(device))
    planned = allocated(
        spec,
        quantization,
        DryGroup(dtype=torch.bfloat16),
        cpu=device == "cpu",
        fp8=target.fp8,
        dtype=torch.bfloat16,
        max_model_len=runner.limits.max_model_len,
        steps=(),
        quantized_cache=fp8,
    )
    rows = []
    for requests in concurrency:
        row = _decode(runner, device, requests, prompt, new_tokens)
        floor = step_floor(spec, planned.weights, requests, prompt + new_tokens // 2, 1 if fp8 else 2, rates, fp8)
        row |= {
            "shape": shape,
            "dtype": "fp8" if fp8 else "bf16",
            "requests": requests,
            "floor_ms": floor * 1e3,
            "of_floor": floor * 1e3 / row["step_ms"],
            "start_s": started,
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    if device == "cuda":
        reserved = torch.cuda.max_memory_reserved() - before
        plan = runner.memory
        total = plan.weight_bytes + plan.cache_bytes + plan.activation_bytes
        rows[-1]["memory_planned"], rows[-1]["memory_reserved"] = total, reserved
    return rows


def _decode(runner: ModelRunner, device: str, requests: int, prompt: int, new_tokens: int) -> dict[str, Any]:
    engine = Engine(runner)
    add_requests(engine, requests, prompt, new_tokens, runner.spec.vocab_size, seed=requests)
    begun = time.perf_counter()
    drawn = 0
    while drawn < requests:  # until all have their first token
        drawn += len(engine.step().tokens)
    prefill = time.perf_counter() - begun
    times: list[float] = []
    last, produced, decoding = time.perf_counter(), 0, time.perf_counter()
    profiled = None
    while engine.has_work:
        if device == "cuda" and len(times) == new_tokens // 2:
            profiled = _profile(engine)
            last = time.perf_counter()
            continue
        produced += len(engine.step().tokens)
        now = time.perf_counter()
        times.append(now - last)
        last = now
    return {
        "prefill_tokens_per_s": requests * prompt / prefill,
        "step_ms": statistics.median(times) * 1e3,
        "tokens_per_s": requests / statistics.median(times),
        "decode_s": time.perf_counter() - decoding,
    } | (profiled or {})


def _profile(engine: Engine, steps: int = 8) -> dict[str, Any]:
    """A step's time in kernels and in gaps between them, the largest gap inside a step, and the host's share."""
    from torch.profiler import ProfilerActivity, profile

    host: list[float] = []
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(steps):
            begun = time.perf_counter()
            plan = engine.scheduler.schedule(time.time())
            if plan is not None:
                engine._executor.submit(plan)
            host.append(time.perf_counter() - begun)
            engine.scheduler.commit(engine._executor.collect())
        torch.cuda.synchronize()
    kernels = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in found.profiler.kineto_results.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA and "Mem" not in event.name()
    )
    busy = sum(end - start for start, end in kernels)
    gaps = sorted(max(0, after[0] - before[1]) for before, after in itertools.pairwise(kernels))
    inside = gaps[: len(gaps) - 3 * steps]  # the largest lie between steps, where sampling is launched
    return {
        "kernels_ms": busy / steps / 1e6,
        "gaps_ms": sum(gaps) / steps / 1e6,
        "largest_gap_inside_us": (inside[-1] if inside else 0) / 1e3,
        "kernels_per_step": len(kernels) / steps,
        "host_ms": statistics.median(host) * 1e3,
    }


PEER = """
import json, sys, time
from vllm import LLM, SamplingParams
folder, (requests, prompt, new_tokens, fp8) = sys.argv[1], map(int, sys.argv[2:])
options = {"quantization": "fp8", "kv_cache_dtype": "fp8"} if fp8 else {}
llm = LLM(folder, load_format="dummy", skip_tokenizer_init=True, max_model_len=2 * (prompt + new_tokens), **options)
params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
prompts = [{"prompt_token_ids": [(i * 977 + j * 31) % 30000 for j in range(prompt)]} for i in range(requests)]
llm.generate(prompts[:1], params, use_tqdm=False)
one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
others = [{"prompt_token_ids": prompt["prompt_token_ids"][::-1]} for prompt in prompts]
begun = time.perf_counter()
llm.generate(others, one, use_tqdm=False)
prefill = time.perf_counter() - begun
begun = time.perf_counter()
llm.generate(prompts, params, use_tqdm=False)
whole = time.perf_counter() - begun
found = {"tokens_per_s": requests * (new_tokens - 1) / (whole - prefill)}
print("PEER", json.dumps(found | {"prefill_tokens_per_s": requests * prompt / prefill}))
"""


def peer(shape: str, fp8: bool, requests: int) -> dict[str, float] | None:
    """The same load through vLLM in a process of its own; None where it is not installed or does not run."""
    probe = subprocess.run([sys.executable, "-c", "import vllm"], capture_output=True, check=False)
    if probe.returncode:
        return None
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[shape]))
        command = [sys.executable, "-c", PEER, folder, str(requests), str(PROMPT), str(NEW_TOKENS), str(int(fp8))]
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    lines = [line for line in ran.stdout.splitlines() if line.startswith("PEER ")]
    if not lines:
        print("vLLM did not run:", ran.stderr[-500:])
        return None
    return dict(json.loads(lines[-1].removeprefix("PEER ")))


def show(report: dict[str, Any]) -> None:
    """A short table."""
    print(f"\n{report['device']}, torch {report['torch']}, triton {report['triton']}, {report['date']}")
    for name, share in report["correctness"].items():
        print(f"  agrees with the plain loop: {name}: {share:.1%}")
    print("model          dtype reqs     tok/s  step ms of floor  kernels     gaps     host   vLLM")
    for row in report["rows"]:
        extra = [f"{row[key]:8.2f}" if key in row else "       -" for key in ("kernels_ms", "gaps_ms", "host_ms")]
        ratio = f"{row['tokens_per_s'] / row['vllm']['tokens_per_s']:5.2f}x" if row.get("vllm") else "     -"
        print(
            f"{row['shape']:14s} {row['dtype']:5s} {row['requests']:4d} {row['tokens_per_s']:9.0f} "
            f"{row['step_ms']:8.2f} {row['of_floor']:8.1%} {' '.join(extra)} {ratio}"
        )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="Llama-3.1-8B,Qwen3-8B,Qwen3-30B-A3B")
    parser.add_argument("--concurrency", default="1,16,64,256")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a rehearsal with short prompts")
    parser.add_argument("--seconds", type=float, default=540.0, help="start no model after so long")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; --device cpu rehearses with the shape `tiny`")
    begun = time.monotonic()
    concurrency = [int(number) for number in options.concurrency.split(",")]
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "correctness": correctness(options.device),
        "rows": [],
        "left_out": [],
    }
    rates = Rates.measure(options.device)
    report["rates"] = dataclasses.asdict(rates)
    folder = Path(os.environ.get("OUT", ROOT / "build"))
    folder.mkdir(exist_ok=True)
    for shape in options.shapes.split(","):
        for fp8 in (False, True):
            if time.monotonic() - begun > options.seconds or (
                fp8 and "fp8" not in rates.operations and options.device == "cuda"
            ):
                report["left_out"].append(f"{shape} {'fp8' if fp8 else 'bf16'}")
                continue
            rows = measure(shape, options.device, fp8, concurrency, rates, small=options.device == "cpu")
            if options.device == "cuda":
                for row in rows:
                    row["vllm"] = peer(shape, fp8, row["requests"])
            report["rows"] += rows
            (folder / "engine-check.json").write_text(json.dumps(report, indent=1))
    show(report)
    if report["left_out"]:
        print("left out:", ", ".join(report["left_out"]))
    if min(report["correctness"].values()) < 1.0:
        raise SystemExit("the ways of running do not agree")


if __name__ == "__main__":
    main()
