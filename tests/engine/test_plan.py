"""What is planned from the config alone is what a run allocates."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_checkpoint
from drafters import Constant, speculation
from quire_engine.config import EngineConfig, SchedulerLimits
from quire_engine.engine import Engine
from quire_engine.errors import InvalidParameter, OutOfMemory
from quire_engine.execution.runner import ModelRunner
from quire_engine.memory.dry_run import DryGroup, allocated
from quire_engine.memory.plan import MemoryPlan, Target, gpu_target, plan_memory
from quire_engine.models.drafts import draft_source
from quire_engine.models.families import spec_of
from quire_engine.quantization.config import quantization_of
from quire_engine.request import EngineSampling, Request
from quire_engine.speculation.draft import Drafter
from quire_engine.speculation.workers import WorkersDrafter
from quire_engine.weights.hf_config import completed
from quire_engine.weights.resolve import find_model
from quire_kernels.hardware import CHIPS
from torch.profiler import ProfilerActivity, profile

ROWS = 32


def plan_of(config: EngineConfig, target: Target, free: int) -> MemoryPlan:
    files = find_model(config)
    facts = files.config
    dtype = torch.float32 if target.kind == "cpu" else torch.bfloat16
    spec, quantization = spec_of(facts), quantization_of(facts, config.quantization)
    return plan_memory(
        config, spec, quantization, target, dtype, free, draft=draft_source(config, files, spec, quantization)
    )


def allocations(profiled: profile) -> tuple[int, int]:
    """Bytes that torch's allocator gave and did not get back, and the most of them at any time."""
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return now, most


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"speculative_config": '{"method": "ngram", "num_speculative_tokens": 3}'}),
        ("llama", {"draft": "qwen3"}),
        ("qwen2", {"quantization": "int8"}),
        ("qwen3", {"quantization": "fp8"}),
        ("qwen3", {"kv_cache_dtype": "fp8"}),
        ("qwen3_moe", {"quantization": "fp8"}),
        ("qwen3_5", {}),
        ("mamba2", {}),
    ],
)
def test_within_three_percent(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    """Weights, cache, and what a full step takes (every row draws, behind drafts if there are some; the budget is used
    up)."""
    own = {"qwen3_moe": {"moe_intermediate_size": 128}, "mamba2": {"num_heads": 32}}
    sizes = {"hidden_size": 256, "intermediate_size": 640, "vocab_size": 4000} | own.get(family, {})
    folder = make_checkpoint(tmp_path / "model", family, **sizes)
    drafter: Drafter = Constant()
    if draft := options.get("draft"):
        asked = {"model": str(make_checkpoint(tmp_path / "draft", draft, **sizes)), "num_speculative_tokens": 3}
        options = {"speculative_config": json.dumps(asked)}
        drafter = WorkersDrafter()
    config = EngineConfig(
        model=str(folder),
        device="cpu",
        kv_cache_memory_bytes=16 << 20,
        max_num_seqs=ROWS,
        max_num_batched_tokens=4 * ROWS,
        **options,
    )
    plan = plan_of(config, Target("cpu", "cpu"), 8 << 30)
    gc.collect()  # what an earlier test leaves would be counted as freed
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as loading:
        runner = ModelRunner(config, find_model(config))
    caches = runner._caches + (runner._drafting._caches if runner._drafting is not None else [])
    cache = sum(part.nbytes for cache in caches for part in cache)
    weights = allocations(loading)[0] - cache
    engine = Engine(runner, speculation(drafter, 3) if runner.limits.speculation is not None else None)
    params = EngineSampling(temperature=1.0, top_p=0.9, max_tokens=6)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as stepping:
        for number in range(ROWS):
            engine.add(Request(number, [number, 7, 8, 9], 4, params))
        while engine.has_work:
            engine.step()
    step = allocations(stepping)[1]
    assert weights == pytest.approx(plan.weight_bytes, rel=0.03)
    assert cache == pytest.approx(plan.cache_bytes, rel=0.03)
    # What torch's own operators take between is known less well.
    if options.keys() <= {"speculative_config"} and family != "qwen3_moe":
        assert step == pytest.approx(plan.activation_bytes, rel=0.03)
    assert weights + cache + step == pytest.approx(
        plan.weight_bytes + plan.cache_bytes + plan.activation_bytes, rel=0.03
    )


PUBLISHED = {  # config.json of published models, and the size of their safetensors files in bytes
    "Llama-3.1-8B": (
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
        },
        16_060_522_496,
    ),
    "Qwen3-30B-A3B": (
        {
            "architectures": ["Qwen3MoeForCausalLM"],
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        61_064_245_248,
    ),
}


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_models(tmp_path: Path, name: str) -> None:
    facts, size = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(facts))
    target, memory = gpu_target("h200")
    config = EngineConfig(model=str(tmp_path), max_model_len=8192, device="cpu")
    plan = plan_of(config, target, memory)
    assert plan.weight_bytes == pytest.approx(size, rel=0.001)
    assert plan.weight_bytes + plan.cache_bytes + plan.activation_bytes <= memory
    halves = EngineConfig(model=str(tmp_path), max_model_len=8192, device="cpu", tensor_parallel_size=2)
    assert plan_of(halves, target, memory).weight_bytes == pytest.approx(size / 2, rel=0.02)
    fp8 = EngineConfig(model=str(tmp_path), max_model_len=8192, device="cpu", quantization="fp8")
    assert plan_of(fp8, target, memory).weight_bytes < 0.6 * size


def test_a_plan_of_stages_covers_the_model(tmp_path: Path) -> None:
    facts, size = PUBLISHED["Llama-3.1-8B"]
    limits = SchedulerLimits(
        vocab_size=128256,
        num_pages=0,
        block_size=16,
        max_model_len=128,
        max_num_seqs=4,
        max_num_batched_tokens=16,
        max_num_queued_reqs=0,
    )
    parts = [
        allocated(
            spec_of(completed(facts)),
            quantization_of({}, None),
            DryGroup(stage=stage, stages=3, dtype=torch.bfloat16),
            limits,
            chip=CHIPS["sm_90"],
            dtype=torch.bfloat16,
        ).weights
        for stage in range(3)
    ]
    assert sum(parts) == pytest.approx(size, rel=0.001)
    assert max(parts) < 0.45 * sum(parts)


def test_what_does_not_fit_says_what_would(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["Llama-3.1-8B"][0]))
    target, memory = gpu_target("L4")
    with pytest.raises(OutOfMemory, match=r"--max-model-len \d+"):
        plan_of(EngineConfig(model=str(tmp_path), device="cpu"), target, memory)
    with pytest.raises(OutOfMemory, match="use more ranks"):
        plan_of(EngineConfig(model=str(tmp_path), device="cpu"), target, 8 << 30)
    with pytest.raises(OutOfMemory, match="lower --max-num-batched-tokens"):
        plan_of(EngineConfig(model=str(tmp_path), device="cpu", max_num_batched_tokens=1 << 20), target, memory)
    with pytest.raises(InvalidParameter, match="H100, H200"):
        gpu_target("GTX 970")


def test_a_request_takes_whole_pages(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["Llama-3.1-8B"][0]))
    for length, pages in ((1, 1), (16, 1), (17, 2), (1600, 100)):
        plan = plan_of(EngineConfig(model=str(tmp_path), device="cpu", max_model_len=length), *gpu_target("H200"))
        assert plan.full_length_requests == plan.num_pages / pages
