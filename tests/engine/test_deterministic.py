"""`--deterministic`: the same bits whatever the batch, the chunks, the cache, and after preemption or resumption."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_checkpoint
from quire_engine.config import EngineConfig
from quire_engine.engine import Engine
from quire_engine.errors import InvalidParameter
from quire_engine.execution.checks import check_served
from quire_engine.execution.runner import ModelRunner
from quire_engine.memory.plan import gpu_target
from quire_engine.models.families import spec_of
from quire_engine.pooling import Pooling
from quire_engine.quantization.config import Quantization
from quire_engine.request import EngineSampling, Request
from quire_engine.scheduler import Scheduler
from quire_engine.weights.resolve import find_model
from quire_kernels.torch_backend import in_tiles

Make = Callable[[str], Path]
Seen = tuple[list[int], bytes]  # tokens, the bits of their log-probabilities


def engine_for(folder: Path, **options: Any) -> Engine:
    config = EngineConfig(
        model=str(folder), device="cpu", deterministic=True, **({"kv_cache_memory_bytes": 8 << 20} | options)
    )
    return Engine(ModelRunner(config, find_model(config)))


def run(engine: Engine, requests: list[Request]) -> dict[int, Seen]:
    scores: dict[int, list[np.ndarray]] = {}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for request, found in engine.step().logprobs:
            scores.setdefault(request.id, []).append(found.top_logprobs)
    return {
        request.id: (request.tokens[request.num_prompt :], b"".join(found.tobytes() for found in scores[request.id]))
        for request in requests
    }


def make_requests(lengths: tuple[int, ...], new_tokens: int, first: int = 0) -> list[Request]:
    generator = np.random.default_rng(5)
    prompts = [generator.integers(4, 300, length).tolist() for length in lengths]
    return [
        Request(
            first + i,
            prompt,
            len(prompt),
            EngineSampling(max_tokens=new_tokens, temperature=0.7 * (i % 2), seed=i, logprobs=3, top_p=0.95),
        )
        for i, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("mistral", {"quantization": "int8"}),
        ("qwen3", {"quantization": "fp8"}),
        ("qwen3_moe", {}),
        ("qwen2_moe", {}),  # experts that all tokens share, behind a gate
        ("qwen3_5", {}),
        ("lfm2", {}),
    ],
)
def test_bits(checkpoint: Make, family: str, options: dict[str, Any]) -> None:
    folder, lengths, new_tokens = checkpoint(family), (1, 5, 16, 33, 70), 24
    alone = {}
    engine = engine_for(folder, enable_prefix_caching=False, **options)
    for request in make_requests(lengths, new_tokens):
        alone |= run(engine, [request])
    engine = engine_for(folder, **options)
    assert run(engine, make_requests(lengths, new_tokens)) == alone, "in a batch"
    for first in (100, 200):  # recurrent states are found the second time
        again = run(engine, make_requests(lengths, new_tokens, first=first))
        assert {number - first: seen for number, seen in again.items()} == alone, "from the prefix cache"
    assert engine.scheduler.stats.prefix_hits > 0
    for budget in (3, 7, 40):
        chunked = engine_for(folder, max_num_batched_tokens=budget, **options)
        assert run(chunked, make_requests(lengths, new_tokens)) == alone, f"in chunks of {budget}"
    tight = engine_for(folder, max_model_len=128, **options)
    limits = tight.scheduler.limits
    tight.scheduler = Scheduler(replace(limits, num_pages=9, num_states=min(3, limits.num_states)))
    assert run(tight, make_requests(lengths, new_tokens)) == alone, "preempted"
    assert tight.scheduler.stats.preemptions > 0
    half = []
    for request in make_requests(lengths, new_tokens):
        told = alone[request.id][0][:11]
        half.append(Request(request.id, request.tokens + told, request.num_prompt, request.params))
    resumed = run(engine_for(folder, **options), half)
    for number, (tokens, bits) in alone.items():
        assert resumed[number][0] == tokens, "resumed"
        assert bits.endswith(resumed[number][1])


def test_bits_at_odd_sizes(tmp_path: Path) -> None:
    """Sizes that no vector divides, where libraries treat ends apart."""
    folder = make_checkpoint(tmp_path, "llama", hidden_size=56, intermediate_size=94, vocab_size=301)
    alone = {}
    engine = engine_for(folder, enable_prefix_caching=False)
    for request in make_requests((3, 9, 20), 16):
        alone |= run(engine, [request])
    assert run(engine_for(folder), make_requests((3, 9, 20), 16)) == alone


def test_bits_under_the_interpreter(tmp_path: Path) -> None:
    """The Triton path: prefill and decode by one launch, in one order."""
    folder = make_checkpoint(tmp_path, "mistral", num_hidden_layers=1)
    alone = {}
    engine = engine_for(folder, attention_backend="triton", enable_prefix_caching=False)
    for request in make_requests((5, 18), 3):
        alone |= run(engine, [request])
    assert run(engine_for(folder, attention_backend="triton"), make_requests((5, 18), 3)) == alone
    chunked = engine_for(folder, attention_backend="triton", max_num_batched_tokens=7)
    assert run(chunked, make_requests((5, 18), 3)) == alone


def test_plain_products_depend_on_the_batch() -> None:
    """Why the mode is needed: without tiles a row's bits change with the rows beside it."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(size, generator=generator) for size in ((576, 1536), (64, 1536)))

    def plain(rows: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(rows, weight)

    changed = [n for n in range(1, 64) if not torch.equal(plain(x[:n]), plain(x)[:n])]
    assert changed, "this machine's library happens to be batch-invariant"
    tiled = in_tiles(plain)
    assert all(torch.equal(tiled(x[:n]), tiled(x)[:n]) for n in range(1, 64))
    order = torch.randperm(64, generator=generator)
    assert torch.equal(tiled(x[order]), tiled(x)[order])


def test_what_is_not_deterministic_is_refused(checkpoint: Make) -> None:
    for options in ({"dtype": "bfloat16"}, {"kv_cache_dtype": "fp8"}, {"attention_backend": "torch"}):
        with pytest.raises(InvalidParameter, match="deterministic on a CPU takes"):
            engine_for(checkpoint("llama"), **options)
    with pytest.raises(InvalidParameter, match="unquantized"):
        engine_for(checkpoint("llama"), attention_backend="triton", quantization="fp8")
    with pytest.raises(InvalidParameter, match="any order"):
        spec = spec_of(find_model(EngineConfig(model=str(checkpoint("llama")))).config, Pooling(kind="mean"))
        config = EngineConfig(model="-", deterministic=True)
        check_served(config, spec, gpu_target("H100")[0], torch.bfloat16, Quantization())
