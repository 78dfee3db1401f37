"""Several ranks over gloo and the step channel equal transformers."""

import gc
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from conftest import channels, listeners, make_checkpoint, processes, wait_until
from quire import LLM, SamplingParams
from quire_cluster.local_ray import start_private_cluster
from quire_cluster.workers import Workers
from quire_engine.config import EngineConfig
from quire_engine.errors import EngineFailure, InvalidParameter, ModelError, OutOfMemory
from quire_engine.guidance.structure import StructuredOutputs
from ray.util.placement_group import placement_group, remove_placement_group
from transformers import AutoModelForCausalLM

Make = Callable[[str], Path]
PROMPTS = [[7, 8, 9], list(range(20, 60)), [5] * 17, [11], [12, 13], [14], list(range(100, 170))]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Of a machine with four GPUs, as far as Ray knows; torch finds none and computes on the CPU."""
    before = dict(os.environ)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 4)
        running = start_private_cluster(num_workers=4)
    yield
    running.stop()
    assert not ray.is_initialized()
    left = {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH")}
    assert left == {name: value for name, value in before.items() if name.startswith("RAY_AUTH")}


def truth(folder: Path, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    """32 greedy tokens of each prompt, and their log-probabilities."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        with torch.no_grad():
            scores = torch.log_softmax(model(out).logits[0, len(prompt) - 1 : -1], -1)
        tokens = out[0, len(prompt) :]
        found.append((tokens.tolist(), scores.gather(1, tokens[:, None])[:, 0].tolist()))
    return found


RANKS: dict[str, dict[str, Any]] = {
    "2": {"tensor_parallel_size": 2},
    "4, each key-value head on two": {"tensor_parallel_size": 4},
    "2, whole experts": {"tensor_parallel_size": 2, "enable_expert_parallel": True},
    "2 stages": {"pipeline_parallel_size": 2},
    "2 stages of 2, whole experts": {
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 2,
        "enable_expert_parallel": True,
    },
}


@pytest.mark.parametrize(
    ("family", "ranks"),
    [
        ("mistral", "2"),  # the other families: tests/engine/test_ranks.py
        pytest.param("llama", "4, each key-value head on two", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", "2, whole experts", marks=pytest.mark.slow),
        pytest.param("qwen2", "2 stages", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", "2 stages of 2, whole experts", marks=pytest.mark.slow),
        pytest.param("nemotron_h", "2 stages", marks=pytest.mark.slow),
    ],
)
def test_ranks(checkpoint: Make, tmp_path: Path, family: str, ranks: str) -> None:
    """In chunks, from the prefix cache, and with too few pages for all: tokens equal, log-probabilities within 1e-4.
    Mistral's has what need not divide: 301 tokens, and one key-value head that both ranks have."""
    odd = {"vocab_size": 301, "num_key_value_heads": 1}
    folder = make_checkpoint(tmp_path, family, **odd) if family == "mistral" else checkpoint(family)
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, logprobs=0)
    heads, layers = (2 if "stages" in ranks and ranks == "2 stages" else 1), (2 if "stages" in ranks else 3)
    page = layers * 2 * heads * 16 * (32 if family in ("mistral", "qwen3", "qwen3_moe") else 16) * 4  # of one rank
    recurrent = family == "nemotron_h"  # one stage keeps states alone, the other keys and values
    with LLM(
        str(folder),
        max_num_batched_tokens=24,
        kv_cache_memory_bytes=1 << 20 if recurrent else 9 * page,
        max_model_len=128,
        **RANKS[ranks],
    ) as llm:
        prompts = [*PROMPTS, [llm.tokenizer.size - 1, 5, 6]]
        expected = truth(folder, prompts)
        for some in (slice(None), slice(6, 7), slice(6, 7)):
            outputs = llm.generate(prompts[some], params, use_tqdm=False)
            for (tokens, scores), output in zip(expected[some], outputs, strict=True):
                assert output.outputs[0].token_ids == tokens
                ours = [float(score.logprobs[0]) for score in output.outputs[0].logprobs or []]
                assert max(abs(a - b) for a, b in zip(ours, scores, strict=True)) < 1e-4
        stats = llm.engine.scheduler.stats
        assert stats.prefix_hits > 0
        assert recurrent or stats.preemptions > 0


def test_structured_outputs_are_those_of_one_rank(byte_level_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a rank of the last stage draws, and steps overlap. A grammar that only that rank finds fault with ends its
    request alone."""
    structures = [{"regex": "[a-h]{3,9}x"}, {"choice": ["the quick", "the lazy"]}, None, {"json": {"enum": [1, "a"]}}]
    params = [SamplingParams(max_tokens=20, seed=5, structured_outputs=structure) for structure in structures]
    prompts = [[70 + number, 71, 72] for number in range(len(params))]
    found = []
    for ranks in ({}, RANKS["2 stages"]):
        with LLM(str(byte_level_folder), max_model_len=128, kv_cache_memory_bytes=1 << 20, **ranks) as llm:
            with monkeypatch.context() as blind:
                blind.setattr(StructuredOutputs, "check", lambda structure: None)
                itself = SamplingParams(structured_outputs={"json": {"$ref": "#"}})
                [output] = llm.generate(prompts[0], itself, use_tqdm=False)
            assert (output.outputs[0].finish_reason, output.outputs[0].token_ids) == ("error", [])
            outputs = llm.generate(prompts, params, use_tqdm=False)
            found.append([output.outputs[0].token_ids for output in outputs])
            assert outputs[1].outputs[0].text in ("the quick", "the lazy")
    assert found[0] == found[1]


def test_what_cannot_be_split_is_refused_with_what_can(checkpoint: Make) -> None:
    with pytest.raises(ModelError, match=r"tensor_parallel_size can be 1, 2, 4$"):
        LLM(str(checkpoint("llama")), tensor_parallel_size=3)
    with pytest.raises(ModelError, match="3 layers cannot be split over 4 stages"):
        LLM(str(checkpoint("llama")), pipeline_parallel_size=4)


def visible_gpus(workers: Workers) -> list[str]:
    """What each rank's process may see: it takes the first of them."""
    ask = [
        actor.__ray_call__.remote(lambda worker: os.environ.get("CUDA_VISIBLE_DEVICES")) for actor in workers._actors
    ]
    return ray.get(ask)


def test_each_rank_takes_a_gpu_of_its_own(checkpoint: Make) -> None:
    """Placed as replicas are: two of them, so that one has others than the first two."""
    config = EngineConfig(model=str(checkpoint("llama")), kv_cache_memory_bytes=1 << 20)
    replicas = []
    for size in (2, 1):
        placement = placement_group([{"CPU": float(size), "GPU": float(size)}])
        sized = replace(config, tensor_parallel_size=size)
        replicas.append((placement, Workers(sized, threads=1, placement=placement, gpus=True)))
    try:
        seen = visible_gpus(replicas[0][1]) + visible_gpus(replicas[1][1])
        assert len(set(seen)) == 3
        assert set(seen) <= {"0", "1", "2", "3"}
    finally:
        for placement, workers in replicas:
            workers.close()
            remove_placement_group(placement)


def test_ranks_offline(checkpoint: Make) -> None:
    """They take a GPU each, meet where nobody else comes, and leave no memory of their channel."""
    before = channels()
    with LLM(str(checkpoint("llama")), tensor_parallel_size=2, kv_cache_memory_bytes=1 << 20) as llm:
        assert isinstance(llm._executor, Workers)
        gpus = visible_gpus(llm._executor)
        found = [one for pid in processes(os.getpid(), "Worker") for one in listeners(psutil.Process(pid))]
        assert len(channels()) > len(before)
    del llm
    gc.collect()
    assert channels() == before
    assert len(set(gpus)) == 2
    assert set(gpus) <= {"0", "1", "2", "3"}
    assert len(found) > 2, "Ray's port of each, and where they meet"
    assert {address.removeprefix("::ffff:") for _, address, _ in found} == {"127.0.0.1"}


def test_fewer_gpus_than_ranks_are_refused_with_the_mend(checkpoint: Make) -> None:
    with pytest.raises(InvalidParameter, match=r"6 workers .* take a GPU each, .* has 4: use fewer, or --device cpu"):
        LLM(str(checkpoint("llama")), tensor_parallel_size=2, pipeline_parallel_size=3)


def test_what_one_rank_meets_in_loading_is_told_at_once(checkpoint: Make) -> None:
    """The second stage alone has attention here, and no room for its cache; the first waits for it with its states."""
    with pytest.raises(OutOfMemory, match=r"^rank 1: one request of 512 tokens takes .* of cache"):
        LLM(str(checkpoint("nemotron_h")), pipeline_parallel_size=2, kv_cache_memory_bytes=160 << 10)


def while_it_loads(folder: Path, disturb: Callable[[int], None]) -> "Future[LLM]":
    """An engine of two ranks that is being opened, one of its processes disturbed before it has loaded."""
    with ThreadPoolExecutor(1) as opening:
        opened = opening.submit(LLM, str(folder), tensor_parallel_size=2, kv_cache_memory_bytes=1 << 20)
        wait_until(lambda: len(processes(os.getpid(), "Worker.load")) == 2)
        disturb(processes(os.getpid(), "Worker.load")[1])
    return opened


def test_a_rank_that_dies_in_loading_is_the_cause(checkpoint: Make) -> None:
    failed = while_it_loads(checkpoint("llama"), lambda pid: os.kill(pid, signal.SIGKILL))
    with pytest.raises(EngineFailure, match=r"^rank [01]: a worker process died$"):
        failed.result()


@pytest.mark.slow
def test_a_rank_may_load_slowly(checkpoint: Make) -> None:
    def hold_up(pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(3)
        os.kill(pid, signal.SIGCONT)

    def patience(worker: Any) -> float:
        everyone = torch.distributed.group.WORLD
        assert worker._group._tensor_group is everyone, "one stage needs no second group"
        return everyone._get_backend(torch.device("cpu")).options._timeout.total_seconds()

    with while_it_loads(checkpoint("llama"), hold_up).result() as llm:
        assert isinstance(llm._executor, Workers)
        assert ray.get([actor.__ray_call__.remote(patience) for actor in llm._executor._actors]) == [3600.0] * 2
        [output] = llm.generate([[7, 8, 9]], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    [(tokens, _)] = truth(checkpoint("llama"), [[7, 8, 9]])
    assert output.outputs[0].token_ids == tokens[:4]
